"""The schema of an experiment's YAML, its layers and what is said about mistakes."""

import dataclasses
import logging
import subprocess
import sys
import textwrap
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
from fish_tuning.experiments.config.training_args import DEFAULT_ARGS, argument_types, peft_methods
from fish_tuning.experiments.config.yaml_file import parse_yaml

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted((CONFIGS / "experiments").glob("*.yaml"))

MINIMAL = """
model:
  name: "roberta-base"
dataset:
  load_args: ["glue", "mrpc"]
lora:
  baseline_rank: 8
  fish_rank: 16
fish_tuning:
  prune_to_ratio_of_baseline: 0.5
"""


def written(folder: Path, text: str = MINIMAL, name: str = "experiment.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


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
    assert config.dataset.known_num_labels


def test_all_shipped_files_are_found():
    """Guards the parametrised test above against an empty list."""
    assert [path.stem for path in SHIPPED] == [
        "bert_sst2",
        "bert_tiny_sst2_fish_50",
        "local_files",
        "quickstart",
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


def test_old_argument_names_are_mapped_before_layers_merge(tmp_path, caplog):
    """Guards old names over a base that uses the new ones, and that the notice is given."""
    written(tmp_path, "base_training: {args: {eval_strategy: epoch}}", "base_config.yaml")
    text = MINIMAL + textwrap.dedent(
        """
        base_training:
          args:
            evaluation_strategy: no
            warmup_ratio: 0.1
            overwrite_output_dir: true
        """
    )
    with caplog.at_level(logging.WARNING):
        args = load_config(written(tmp_path, text)).training_args
    assert args["eval_strategy"] == "no"
    assert args["warmup_steps"] == 0.1
    assert set(args) == {*DEFAULT_ARGS, "warmup_steps"}
    assert "base_training.args.evaluation_strategy: is called eval_strategy now" in caplog.text
    assert "base_training.args.overwrite_output_dir" in caplog.text


def test_argument_names_are_those_of_transformers():
    """Guards the reading of argument names from source against the real dataclass."""
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(argument_types()) == fields
    assert set(DEFAULT_ARGS) <= fields


def test_default_arguments_build_training_arguments(tmp_path):
    """Guards against defaults that transformers refuses together."""
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), **DEFAULT_ARGS)
    assert args.learning_rate == 5e-5


def test_peer_names_are_those_of_peft():
    """Guards the reading of method names from source against the real enum."""
    from peft import PeftType

    assert set(peft_methods()) == {member.name for member in PeftType}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("no", "no"),
        ("[no, yes, on]", ["no", "yes", "on"]),
        ("true", True),
        ("017", "017"),
        ("1_000", 1000),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("", None),
        ("~", None),
        ("'5'", "5"),
    ],
)
def test_plain_scalars(text, value):
    """Guards against YAML 1.1: learning rates read as text, the label `no` read as false."""
    parsed = parse_yaml(text, "x")
    assert parsed == value
    assert type(parsed) is type(value)


def test_merge_key_and_anchors(tmp_path):
    """Guards that the duplicate-key check leaves YAML's merge key alone."""
    text = """
        model: &m {name: a}
        dataset: {name: installed_text}
        lora: &l {baseline_rank: 2, fish_rank: 4}
        peers:
          - {method: lora, name: x, config: &c {r: 1}}
          - {method: lora, name: y, config: {<<: *c, r: 2, lora_alpha: 3}}
        """
    config = load_config(written(tmp_path, text))
    assert [peer.config for peer in config.peers] == [{"r": 1}, {"r": 2, "lora_alpha": 3}]
    assert [(peer.method, peer.label) for peer in config.peers] == [("LORA", "x"), ("LORA", "y")]


BAD = [
    ("modle: {name: x}", r"modle: unknown key; did you mean 'model'\?"),
    ("lora: {baselin_rank: 1}", r"lora\.baselin_rank: unknown key; did you mean 'lora.baseline"),
    ("lora: {output_dir: x}", r"lora\.output_dir: unknown key; did you mean 'training.output_dir"),
    ("lora: {zzz: x}", r"lora\.zzz: unknown key .*known: baseline_rank, fish_rank"),
    ("lora: {learning_rate: 1}", r"did you mean 'training.args_override.learning_rate'"),
    ("lora: {baseline_rank: 0}", r"lora\.baseline_rank: 0 .*greater than or equal to 1.*Rank of"),
    ("lora: {fish_rank: eight}", r"lora\.fish_rank: 'eight' should be a valid integer"),
    ("lora: {fish_rank: true}", r"lora\.fish_rank: True should be a valid integer"),
    ("lora: {dropout: 1.0}", r"lora\.dropout: 1.0 should be less than 1"),
    ("lora: {target_modules: 3}", r"lora\.target_modules: 3 should be a valid list or should be"),
    ("lora: {names_to_exclude: ['(']}", r"names_to_exclude: .*'\(' is no valid regular expression"),
    ("lora: 8", r"lora: 8 should be a valid dictionary"),
    ("model: {precision: float64}", r"model\.precision: 'float64' .*'bf16'"),
    ("model: {quantization: 2bit}", r"model\.quantization: '2bit' .*'4bit' or '8bit'"),
    ("model: {name: null}", r"model\.name: None should be a valid string"),
    ("training: {max_seq_length: 0}", r"training\.max_seq_length: 0"),
    ("training: {args_override: {seed: 1}}", r"args_override\.seed: is set .*use seeds instead"),
    (
        "training: {args_override: {learning_rat: 1}}",
        r"args_override\.learning_rat: .*did you mean 'learning_rate'\?",
    ),
    (
        "training: {args_override: {learning_rate: fast}}",
        r"args_override\.learning_rate: 'fast' should be of type float",
    ),
    ("base_training: {args: {max_steps: true}}", r"max_steps: True should be of type int"),
    (
        "base_training: {args: {evaluation_strategy: 'no', eval_strategy: 'no'}}",
        r"evaluation_strategy: is the old name of eval_strategy, given too",
    ),
    ("fish_tuning: {prune_to_ratio_of_baseline: 0}", r"of_baseline: 0 should be greater than 0"),
    ("fish_tuning: {prune_to_ratio_of_baseline: 1.5}", r"of_baseline: 1.5 .*less than or equal"),
    ("fish_tuning: {prune_to_ratio_of_baseline: .nan}", r"of_baseline: nan .*finite"),
    ("fish_tuning: {budgets: []}", r"budgets: \[\] .*at least 1 item"),
    ("fish_tuning: {budgets: [0.5, 0.5]}", r"budgets: .*0.5 more than once"),
    ("fish_tuning: {budgets: [0.5, 2]}", r"budgets\[1\]: 2 "),
    ("fish_tuning: {num_samples: 0}", r"num_samples: 0"),
    ("fish_tuning: {methods_to_run: [LoRA-FSIH]}", r"methods_to_run\[0\]: 'LoRA-FSIH' .*'LoRA-FA'"),
    ("fish_tuning: {methods_to_run: [fish, LoRA-FISH]}", r"LoRA-FISH more than once"),
    ("fish_tuning: {scope: layer}", r"scope: 'layer' .*'per_tensor'"),
    ("fish_tuning: {scoring_point: end}", r"scoring_point: 'end' .*'warmup'"),
    (
        "fish_tuning: {variants: [{name: x, rule: {scpoe: global}}]}",
        r"variants\[0\]\.rule\.scpoe: Extra inputs",
    ),
    (
        "fish_tuning: {variants: [{name: x, rule: {warmup_steps: 0}}]}",
        r"variants\[0\]\.rule\.warmup_steps: .*greater than or equal to 1",
    ),
    ("fish_tuning: {variants: [{name: x, rule: {}}]}", r"variants\[0\]: 'x' changes nothing"),
    (
        "fish_tuning: {variants: [{name: x, adapter: {method: LORRA}}]}",
        r"variants\[0\]\.adapter\.method: .*did you mean LORA\?",
    ),
    (
        "fish_tuning: {variants: [{name: LoRA-FISH, rule: {scope: global}}]}",
        r"fish_tuning: 'LoRA-FISH' names two arms",
    ),
    ("learning_rate_search: {values: [1]}", r"learning_rate_search\.values: .*at least 2 items"),
    ("seeds: []", r"seeds: \[\] .*at least 1 item"),
    ("seeds: [1, 1]", r"seeds: .*1 more than once"),
    ("seeds: 3", r"seeds: 3 should be a valid list. Every arm runs once"),
    ("seeds: [-1]", r"seeds\[0\]: -1 "),
    ("peers: [{method: SHIRRA}]", r"peers\[0\]\.method: .*did you mean SHIRA\?"),
    ("peers: [{method: qqqq}]", r"peers\[0\]\.method: .*known are .*ADALORA"),
    ("peers: [{method: IA3, nmae: x}]", r"peers\[0\]\.nmae: .*'peers\[0\]\.name'"),
    ("peers: [{name: x}]", r"peers\[0\]\.method: is required"),
    ("peers: [{method: IA3}, {method: IA3}]", r"peers: 'IA3' names two arms"),
    ("dataset: {metric: bleu}", r"dataset\.metric: 'bleu' is no known metric; use one of accuracy"),
    ("dataset: {metric: f1, task: regression}", r"'f1' does not measure regression; .*pearson"),
    ("dataset: {path: x}", r"dataset\.path: is given beside load_args"),
    ("dataset: {load_args: null}", r"dataset\.load_args: names no data; give load_args, path"),
    ("dataset: {header: false}", r"dataset\.header: is for local files"),
    ("dataset: {text_column: [a, b, c]}", r"dataset\.text_column: .*more than two columns"),
    ("dataset: {text_column: a, label_column: a}", r"dataset\.label_column: 'a' is a text column"),
    ("dataset: {load_args: null, path: {dev: x}}", r"dataset\.path: has no 'train' among .*'dev'"),
    ("dataset: {validation_split: train}", r"validation_split: is the training split"),
    ("dataset: {validation_fraction: 1.0}", r"validation_fraction: 1.0"),
    ("dataset: {max_train_samples: 0}", r"max_train_samples: 0"),
    ("dataset: {num_labels: 1}", r"num_labels: 1 class cannot be told apart"),
    ("dataset: {num_labels: 3, label_names: [a, b]}", r"num_labels: 3 contradicts the 2"),
    ("dataset: {label_names: [a, b], task: regression}", r"label_names: is for classification"),
    ("dataset: {label_names: [a, a]}", r"label_names: .*a more than once"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_bad_values(tmp_path, text, message):
    """Guards that each mistake is refused with its path, its value and the way out."""
    written(tmp_path, MINIMAL, "base_config.yaml")
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert len(caught.value.problems) == 1
    assert str(path) in str(caught.value)


def test_all_problems_at_once(tmp_path):
    """Guards against a user who mends a file one message at a time."""
    written(tmp_path, MINIMAL, "base_config.yaml")
    texts = ["lora: {baseline_rank: 0, rank: 3}", "seeds: [1, 1]", "modle: 1"]
    texts += ["training: {args_override: {seed: 1, learning_rat: 2}}", "dataset: {metric: bleu}"]
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, "\n".join(texts)))
    paths = {problem.split(":")[0] for problem in caught.value.problems}
    assert paths == {
        "lora.baseline_rank",
        "lora.rank",
        "seeds",
        "modle",
        "training.args_override.seed",
        "training.args_override.learning_rat",
        "dataset.metric",
    }
    assert "7 problems" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n- b\n", "holds a list, not a mapping"),
        (b"just text", "holds a str, not a mapping"),
        (b"a: [1\n", r"line 2: "),
        (b"seeds: [1]\nlora: {}\nseeds: [2]\n", r"line 3: the key 'seeds' is given twice"),
        (b"a: !!python/object/apply:os.system ['true']\n", r"line 1: could not determine a constr"),
        (b"a: \xff\xfe", "is not UTF-8"),
        (b"a: \x00", "is not valid YAML"),
        (b'a: "\\ud800"', "is not valid YAML: .* surrogates not allowed"),
        (b"? [1]\n: 2\n", "unhashable key"),
        (b"model: &a {name: x, config_overrides: *a}\n", "is not valid YAML: Circular reference"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    """Guards against a traceback, or code run, where a file is not a plain YAML mapping."""
    path = tmp_path / "e.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_file_and_folder(tmp_path):
    """Guards the two commonest wrong paths."""
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="is a folder; name a YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize("override", ["lora.fish_rank", "=3", "lora..x=3", "lora.fish_rank=[1"])
def test_bad_overrides(tmp_path, override):
    """Guards the command line's `--set` against text that is no assignment."""
    with pytest.raises(ConfigError, match="--set "):
        load_config(written(tmp_path), [override])


def test_byte_order_mark(tmp_path):
    """Guards files saved by Windows editors."""
    path = tmp_path / "e.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(path).model.name == "roberta-base"


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
    """Guards against Python's randomised hash in the digest."""
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
