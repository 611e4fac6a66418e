"""Every example runs, on small models and data; nothing is downloaded."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fish_tuning import FishMask, get_mask
from tests.examples.conftest import EXAMPLES

STEPS = "--max-steps", 2


def assert_masked(names, folder):
    """The adapter is saved with its mask, of as many entries as the example says."""
    assert FishMask.from_pretrained(folder) == get_mask(names["trainer"].model)
    mask = names["mask"]
    pool = {name: bits for name, bits in mask.items() if "modules_to_save" not in name}
    selected = sum(int(bits.sum()) for bits in pool.values())
    ratio = mask.provenance["keep_ratio"]
    assert selected == round(ratio * sum(bits.numel() for bits in pool.values()))


def test_text_classification(run_example, classifier, sentences, tmp_path):
    names = run_example(
        "text_classification.py", "--model", classifier, "--dataset", sentences, *STEPS
    )
    assert_masked(names, tmp_path / "output" / "classifier")


@pytest.mark.parametrize("options", [[], ["--four-bit"]], ids=["LoRA", "QLoRA"])
def test_sft(options, run_example, language_model, chats, tmp_path):
    if options:
        pytest.importorskip("bitsandbytes")
    names = run_example("sft.py", "--model", language_model, "--dataset", chats, *STEPS, *options)
    assert_masked(names, tmp_path / "output" / "sft")
    layers = {type(module).__name__ for module in names["trainer"].model.modules()}
    assert ("Linear4bit" in layers) == bool(options)


def test_dpo(run_example, language_model, preferences, tmp_path):
    names = run_example("dpo.py", "--model", language_model, "--dataset", preferences, *STEPS)
    assert_masked(names, tmp_path / "output" / "dpo")


def test_base_weights(run_example, language_model, chats):
    names = run_example("base_weights.py", "--model", language_model, "--dataset", chats, *STEPS)
    trained, merged = names["model"], names["merged"]
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected, actual = trained.eval()(ids).logits, merged.eval()(ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_image_classification(run_example, vision_model, images, tmp_path):
    names = run_example(
        "image_classification.py",
        *("--model", vision_model, "--dataset", images, "--split", "train", *STEPS),
    )
    assert_masked(names, tmp_path / "output" / "images")


def test_plain_loop(run_example, classifier, sentences, tmp_path):
    """Guards a loop that resumes with another mask or from other values."""
    command = "plain_loop.py", "--model", classifier, "--dataset", sentences, "--epochs"
    first = run_example(*command, 1)
    again = run_example(*command, 2)
    assert again["first"] == 1
    assert get_mask(again["model"]) == get_mask(first["model"])


def saved_adapter(language_model, folder, **config):
    """A LoRA whose B is not 0, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(language_model)
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
    get_peft_model(model, lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(language_model).save_pretrained(folder)
    return folder


def test_load_adapter(run_example, language_model, tmp_path, capsys):
    """Guards a merged model that answers otherwise than the adapter."""
    adapter = saved_adapter(language_model, tmp_path / "adapter")
    run_example("load_adapter.py", adapter)
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.startswith("vllm serve ") and command.endswith(f"--lora-modules mine={adapter}")
    with_adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(language_model), adapter
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output" / "merged")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, with_adapter(ids).logits)


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        ({"use_dora": True}, "it is a DoRA"),
        ({"modules_to_save": ["lm_head"]}, "it trains modules in full (modules_to_save)"),
        ({"rank_pattern": {"q_proj": 2}}, "its ranks differ by module"),
        ({"bias": "lora_only"}, "it trains biases"),
        ({"r": 32}, "its rank is above the server's --max-lora-rank"),
    ],
)
def test_adapters_to_merge_first(config, obstacle, run_example, language_model, tmp_path, capsys):
    """Guards advice to serve an adapter of which the server would leave out a part."""
    run_example("load_adapter.py", saved_adapter(language_model, tmp_path / "adapter", **config))
    assert f"(the adapter: {obstacle})" in capsys.readouterr().out.splitlines()[-1]


def test_notebook(classifier, sentences, tmp_path, monkeypatch):
    """Guards cells that do not run one after the other, and outputs left in the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    program = "\n".join("".join(cell["source"]) for cell in code)
    for default, small in (
        ("google-bert/bert-base-uncased", str(classifier)),
        ("stanfordnlp/sst2", str(sentences)),
        ("max_steps=200", "max_steps=2"),
    ):
        assert default in program
        program = program.replace(default, small)
    names: dict[str, Any] = {}
    exec(compile(program, "first_steps.ipynb", "exec"), names)
    assert get_mask(names["trainer"].model) == names["mask"]


def test_every_example_is_listed_and_tested():
    """Guards an example that nobody finds, or that no test runs."""
    files = {file.name for file in EXAMPLES.iterdir() if file.is_file()} - {"README.md"}
    listed = re.findall(r"^\| \[.*?\]\((.*?)\) \|", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(files)
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert all(f'"{name}"' in tests for name in files)
