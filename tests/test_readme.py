"""The README is run, block by block."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fish_tuning import get_mask
from fish_tuning.cli import main
from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.models.counts import count_parameters
from tests.experiments.tiny_language_model import language_model

ROOT = Path(__file__).parents[1]
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_every_block_has_a_test():
    """Guards a block in a language that none of the tests below runs."""
    languages = re.findall(r"^```(\w*)\n.*?^```$", README, re.MULTILINE | re.DOTALL)
    assert set(languages) == {"python", "console", "yaml", "text"}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A model of the example's architecture with somewhat more than 57,600 LoRA parameters."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8}
    return language_model(tmp_path_factory.mktemp("model"), **sizes)


def test_python_blocks_run_in_order(small_model, tmp_path, monkeypatch, capsys):
    """Guards examples that do not run as they are printed."""
    monkeypatch.chdir(tmp_path)
    added, example, *others = blocks("python")
    namespace: dict[str, Any] = {}
    for block in (example, *others):
        block = block.replace(HUB_NAME, str(small_model))
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "adapter" / "fish_mask.safetensors").is_file()
    assert namespace["mask"].num_trainable == 57_600
    assert get_mask(namespace["model"]) == namespace["mask"]
    assert capsys.readouterr().out.startswith("trainable params: 57,600 || all params: ")
    assert all(line in example for line in added.splitlines())


def test_the_example_works_without_its_added_lines(small_model, tmp_path, monkeypatch):
    """Guards the claim that two lines are all that is added."""
    monkeypatch.chdir(tmp_path)
    kept = [line for line in blocks("python")[1].splitlines() if "# added" not in line]
    assert len(kept) == len(blocks("python")[1].splitlines()) - 2
    code = "\n".join(kept).replace(HUB_NAME, str(small_model))
    exec(compile(code, "README.md", "exec"), {})
    assert not (tmp_path / "adapter" / "fish_mask.safetensors").exists()


def test_the_printed_count():
    """Guards the example's output: the sizes are those of the model that it names."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
        size = base.num_parameters()
        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    total = size + 57_600
    line = (
        f"trainable params: 57,600 || all params: {total:,} || trainable%: {5_760_000 / total:.4f}"
    )
    assert f"{line}\n" in blocks("text")
    assert f"of {model.get_nb_trainable_parameters()[0]:,} LoRA parameters" in README


def test_the_quickstarts_counts():
    """Guards the printed table: as many parameters in every arm as the config's plan counts."""
    config = load_config(ROOT / "configs/experiments/quickstart.yaml")
    counts = {name: count.trainable for (name, _), count in count_parameters(config, 6).items()}
    (table,) = (block for block in blocks("text") if "Method" in block)
    for name, count in counts.items():
        assert re.search(rf"^ {re.escape(name)} .* {count:,} ", table, re.MULTILINE)
    assert set(counts.values()) == {6_918}


@pytest.mark.parametrize("block", blocks("yaml"))
def test_experiments_load(block, tmp_path):
    """Guards a YAML that is said to be complete as it stands."""
    (tmp_path / "experiment.yaml").write_text(block, encoding="utf-8")
    config = load_config(tmp_path / "experiment.yaml")
    assert (config.lora.baseline_rank, config.fish_tuning.ratios) == (8, [0.5])


@pytest.mark.parametrize(
    "command", [line[2:] for block in blocks("console") for line in block.splitlines()]
)
def test_commands_exist(command):
    """Guards commands, options and files that the project does not have."""
    program, *arguments = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        assert command == "pip install '.[llm]'"
        assert "\nllm = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    else:
        assert program == "fish-tuning"
        help_text = CliRunner().invoke(main, [arguments[0], "--help"])
        assert help_text.exit_code == 0
        assert all(option in help_text.output for option in arguments if option.startswith("--"))
        files = [ROOT / argument for argument in arguments if argument.endswith(".yaml")]
        assert all(file.is_file() for file in files)
        if "--set" in arguments:
            load_config(files[0], [arguments[-1]])
