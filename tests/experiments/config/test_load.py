"""The layers of a config, its files and its digest."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from fish_tuning.experiments.config.adapters import PeerConfig
from fish_tuning.experiments.config.load import (
    ConfigError,
    ExperimentConfig,
    check_output_dir,
    load_config,
)
from fish_tuning.experiments.config.training_args import DEFAULT_ARGS
from tests.experiments.config.config_files import MINIMAL, written

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted((CONFIGS / "experiments").glob("*.yaml"))


def test_minimal_file_is_complete(tmp_path):
    """Guards the promise that everything the shortest file leaves out has a default."""
    config = load_config(written(tmp_path, name="mine.yaml"))
    assert config.model.name == "roberta-base"
    assert (config.lora.baseline_rank, config.lora.fish_rank) == (8, 16)
    assert config.fish_tuning.ratios == [0.5]
    assert config.seeds == [42]
    assert config.dataset.known_num_labels == 2
    assert config.training.output_dir == "results/mine"
    assert config.training_args == DEFAULT_ARGS
    assert config.fish_tuning.methods_to_run == [
        "Original LoRA",
        "LoRA-FISH",
        "LoRA-FISH-rand",
        "LoRA-FISH-rev",
    ]


def test_all_keys_of_the_original_work(tmp_path):
    """Guards files written for the first implementation: every key of theirs must still load."""
    config = load_config(
        written(
            tmp_path,
            """
            model: {name: m, config_overrides: {pad_token_id: 0}}
            dataset:
              name: sst2
              load_args: ["glue", "sst2"]
              text_column: sentence
              label_column: label
              validation_split: validation
            lora:
              baseline_rank: 4
              fish_rank: 8
              dropout: 0.05
              target_modules: [query, key]
              names_to_exclude: [classifier]
            training:
              max_seq_length: 64
              output_dir: ./out
              args_override: {evaluation_strategy: steps, max_steps: 10, fp16: true}
            fish_tuning:
              methods_to_run: ["fish", "rand", "rev"]
              num_samples: 16
              prune_to_ratio_of_baseline: 0.25
            base_training:
              args: {learning_rate: 0.001, do_train: true}
            """,
        )
    )
    assert config.model.config_overrides == {"pad_token_id": 0}
    assert config.dataset.text_column == ["sentence"]
    assert config.lora.target_modules == ["query", "key"]
    assert config.training_args["eval_strategy"] == "steps"
    assert config.training_args["learning_rate"] == 0.001
    # The first implementation always ran the baseline beside its short names.
    assert config.fish_tuning.methods_to_run == [
        "Original LoRA",
        "LoRA-FISH",
        "LoRA-FISH-rand",
        "LoRA-FISH-rev",
    ]


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ("[]", ["Original LoRA"]),
        ("[fish]", ["Original LoRA", "LoRA-FISH"]),
        ("[rand, Original LoRA]", ["LoRA-FISH-rand", "Original LoRA"]),
        ("[LoRA-FISH]", ["LoRA-FISH"]),
        ("[LoRA-FA, LoRA (FISH rank)]", ["LoRA-FA", "LoRA (FISH rank)"]),
    ],
)
def test_methods(tmp_path, methods, expected):
    """Guards against a baseline that is added or left out against what the file says."""
    config = load_config(written(tmp_path), [f"fish_tuning.methods_to_run={methods}"])
    assert config.fish_tuning.methods_to_run == expected


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_load(path):
    """Guards every shipped experiment against a renamed key."""
    config = load_config(path)
    assert config.training.output_dir == f"./results/{path.stem}" or path.stem == "roberta_mrpc"
    assert config.dataset.known_num_labels is not None
    assert bool(config.dataset.known_num_labels) is not config.is_generative


def test_all_shipped_files_are_found():
    """Guards the parametrised test above against an empty list."""
    assert [path.stem for path in SHIPPED] == [
        "bert_sst2",
        "bert_tiny_sst2_fish_50",
        "chat_smollm2",
        "e2e_smollm2",
        "gsm8k_smollm2",
        "local_files",
        "metamathqa_llama",
        "quickstart",
        "quickstart_llm",
        "roberta_mrpc",
        "tinyllama_rotten_tomatoes_fish_25",
    ]


def test_shipped_base_states_the_defaults(tmp_path):
    """Guards against an experiment that means something else outside the repository."""
    alone = load_config(written(tmp_path))
    with_base = load_config(
        written(tmp_path / "repo" / "experiments"),
    )
    assert with_base == alone
    (tmp_path / "repo" / "base_config.yaml").write_bytes(
        (CONFIGS / "base_config.yaml").read_bytes()
    )
    assert load_config(tmp_path / "repo" / "experiments" / "experiment.yaml") == alone


def test_precedence(tmp_path):
    """Guards base < file < override, deep merging of mappings and replacing of lists."""
    written(
        tmp_path,
        """
        seeds: [1, 2, 3]
        lora: {dropout: 0.1, fish_rank: 4, target_modules: [a, b]}
        base_training: {args: {learning_rate: 1e-3, weight_decay: 0.5}}
        """,
        "base_config.yaml",
    )
    path = written(
        tmp_path,
        MINIMAL + "base_training: {args: {weight_decay: 0.25}}\nseeds: [7]\ntraining:\n",
        "experiments/e.yaml",
    )
    config = load_config(path, ["lora.fish_rank=32", "dataset.load_args=[imdb]"])
    assert config.lora.dropout == 0.1
    assert config.lora.baseline_rank == 8
    assert config.lora.fish_rank == 32
    assert config.lora.target_modules == ["a", "b"]
    assert config.seeds == [7]
    assert config.dataset.load_args == ["imdb"]
    assert config.training_args["learning_rate"] == 1e-3
    assert config.training_args["weight_decay"] == 0.25
    assert config.training_args["per_device_train_batch_size"] == 16


def test_nearer_base_wins_and_base_is_not_laid_under_itself(tmp_path):
    """Guards the lookup of base_config.yaml."""
    written(tmp_path, "seeds: [1]", "base_config.yaml")
    written(tmp_path, "seeds: [2]", "sub/base_config.yaml")
    assert load_config(written(tmp_path, name="sub/e.yaml")).seeds == [2]
    base = written(tmp_path, MINIMAL, "sub/base_config.yaml")
    assert load_config(base).seeds == [1]


def test_resolved_config_round_trips(tmp_path):
    """Guards that a recorded config can be run again: it loads as itself."""
    config = load_config(SHIPPED[0], ["seeds=[1, 2]", "peers=[{method: ia3}]"])
    dumped = config.model_dump(mode="json")
    again = load_config(written(tmp_path, yaml.safe_dump(dumped), "again.yaml"))
    assert again == config
    assert again.digest() == config.digest()
    assert ExperimentConfig.model_validate(dumped) == config


def test_digest(tmp_path):
    """Guards resumption: more arms or seeds keep finished runs, any other change voids them."""
    path = written(tmp_path)
    digest = load_config(path).digest()
    keep = ["seeds=[1, 2]", "training.output_dir=x", "fish_tuning.budgets=[0.1]"]
    keep += ["fish_tuning.methods_to_run=[LoRA-FISH]", "peers=[{method: IA3}]"]
    for override in keep:
        assert load_config(path, [override]).digest() == digest, override
    change = ["lora.fish_rank=17", "training.args_override.learning_rate=1.0", "model.name=x"]
    change += ["fish_tuning.scope=global", "dataset.max_train_samples=5", "lora.dropout=0.1"]
    assert len({load_config(path, [o]).digest() for o in change} | {digest}) == len(change) + 1


def test_digest_does_not_depend_on_the_process(tmp_path):
    """Guards against Python's randomized hash in the digest."""
    path = written(tmp_path)
    code = "import sys; from fish_tuning.experiments.config.load import load_config as l; "
    code += "print(l(sys.argv[1]).digest(), 'torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    # Checking a config must not wait for heavy imports either.
    assert run.stdout.split() == [load_config(path).digest(), "False", "False"]


def test_every_field_is_described():
    """Guards the generated documentation against a field without a text."""
    pending: list[Any] = [ExperimentConfig, PeerConfig]
    while pending:
        section = pending.pop()
        for name, field in section.model_fields.items():
            assert (field.description or "").endswith("."), f"{section.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                pending.append(field.annotation)


def test_output_dir(tmp_path):
    """Guards the check against creating folders, and against a file in the way."""
    check_output_dir(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"training\.output_dir: .*is a file; choose another"):
        check_output_dir(tmp_path / "file" / "b")


def test_output_dir_without_permission(tmp_path, monkeypatch):
    """Guards the message for a folder that may not be written."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"training\.output_dir: .*no permission in"):
        check_output_dir(tmp_path / "a")
