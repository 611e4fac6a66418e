"""What is said about mistakes in a config."""

import pytest

from fish_tuning.experiments.config.load import (
    ConfigError,
    load_config,
)
from tests.experiments.config.config_files import MINIMAL, written

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
    (
        "lora: {names_to_exclude: ['(']}",
        r"names_to_exclude: .*'\(' is not a valid regular expression",
    ),
    ("lora: 8", r"lora: 8 should be a valid dictionary"),
    (
        "learning_rates: {LoRA: 1.0e-3}",
        r"learning_rates\.LoRA: is no arm; the arms are Original LoRA",
    ),
    ("learning_rates: {LoRA-FISH: 0}", r"learning_rates\.LoRA-FISH: 0 should be greater than 0"),
    (
        "learning_rates: {LoRA-FISH: [1.0e-3, 1.0e-2]}",
        r"learning_rates\.LoRA-FISH: lists rates for a search; keep one of them, or add",
    ),
    (
        "learning_rates: {LoRA-FISH: [1.0e-3]}",
        r"learning_rates\.LoRA-FISH: .*at least 2 items",
    ),
    (
        "fish_tuning: {methods_to_run: [LoRA-FISH-ranks], scoring_point: start}",
        r"fish_tuning\.scoring_point: 'start' gives no scores to choose ranks by; use perturbed",
    ),
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
        "base_training: {args: {per_device_train_batch_size: 0}}",
        r"per_device_train_batch_size: 0 must be at least 1",
    ),
    (
        "training: {args_override: {gradient_accumulation_steps: -1}}",
        r"gradient_accumulation_steps: -1 must be at least 1",
    ),
    ("training: {args_override: {max_length: 0}}", r"max_length: 0 must be at least 1"),
    (
        "base_training: {args: {bf16: true}}\ntraining: {args_override: {fp16: true}}",
        r"training\.args_override\.fp16: is true beside bf16; keep one",
    ),
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
    (
        "dataset: {metric: meteor}",
        r"dataset\.metric: 'meteor' is not a known metric; use one of accuracy",
    ),
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
    ("dataset: {num_labels: 1}", r"num_labels: 1 class leaves nothing to predict"),
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
    """Guards against a user who fixes a file one message at a time."""
    written(tmp_path, MINIMAL, "base_config.yaml")
    texts = ["lora: {baseline_rank: 0, rank: 3}", "seeds: [1, 1]", "modle: 1"]
    texts += ["training: {args_override: {seed: 1, learning_rat: 2}}", "dataset: {metric: meteor}"]
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
