"""The plan: exact counts from a config.json alone, and steps."""

import json
import os
import re
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fish_tuning.cli import main
from fish_tuning.experiments.config.load import ConfigError, load_config
from fish_tuning.experiments.plan import PlannedArm, optimizer_steps, plan_experiment
from fish_tuning.experiments.runs.preflight import check_experiment

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted((CONFIGS / "experiments").glob("*.yaml"))

BERT = {
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 28996,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
BERT_TINY = BERT | {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 30522,
}
ROBERTA = BERT | {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
MINILM = BERT | {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "intermediate_size": 1536,
    "vocab_size": 30522,
}
TINYLLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA_3B = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}

# LoRA's count, if it is an arm, and those of the other arms, head included. BERT-base: 12 layers x
# 3 modules x rank 8 x (768 + 768), and a head of 2 x 768 + 2. RoBERTa's head has a layer of
# 768 x 768 more. Language models have no new head; PEFT's own comparison lists 9,175,040 for LoRA
# of rank 32.
PUBLISHED = {
    "bert_sst2": (BERT, 443_906, [443_906]),
    "bert_tiny_sst2_fish_50": (BERT_TINY, 6_402, [3_201]),
    "chat_smollm2": (SMOLLM2, 1_221_120, [1_221_120]),
    "e2e_smollm2": (SMOLLM2, 57_600, [57_600]),
    "gsm8k_smollm2": (SMOLLM2, 1_221_120, [1_221_120]),
    "local_files": (MINILM, 74_498, [74_498, 37_249]),
    "metamathqa_llama": (LLAMA_3B, 9_175_040, [9_175_040, 917_504]),
    "quickstart": (MINILM, None, [6_918]),
    "quickstart_llm": (SMOLLM2, 57_600, [57_600]),
    "roberta_mrpc": (ROBERTA, 887_042, [443_521]),
    "tinyllama_rotten_tomatoes_fish_25": (TINYLLAMA, 2_256_896, [564_224]),
}


def model_folder(folder: Path, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a plan must not ask the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files(path, tmp_path, monkeypatch, no_network):
    """Guards the published counts, and a plan that needs weights, data or a network."""
    config, lora, masked = PUBLISHED[path.stem]
    folder = model_folder(tmp_path / "model", config)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["plan", str(path), "--set", f"model.name={folder}"])
    assert result.exit_code == 0, result.output
    rows = {}
    for line in result.stdout.splitlines():
        if "%" in line:
            words = line.split()
            share = next(i for i, word in enumerate(words) if word.endswith("%"))
            rows[" ".join(words[: share - 2])] = words[share - 2]
    if lora is not None:
        assert rows.pop("Original LoRA") == f"{lora:,}"
    assert set(rows.values()) == {f"{count:,}" for count in masked}
    assert os.listdir(tmp_path) == ["model"]


def plan(config):
    return plan_experiment(check_experiment(config, to_train=False))


def written(folder: Path, text: str) -> Path:
    path = folder / "e.yaml"
    path.write_text(f"model: {{name: {model_folder(folder / 'm', BERT_TINY)}}}\n{text}")
    return path


LOCAL = "dataset: {path: data.csv}\n"


def data(folder: Path, rows: int = 50) -> None:
    lines = [f"sentence number {i},{['yes', 'no', 'maybe'][i % 3]}" for i in range(rows)]
    (folder / "data.csv").write_text("\n".join(["text,label", *lines, ""]))


def test_local_data_gives_labels_examples_and_steps(tmp_path, monkeypatch):
    """Guards counts of a head whose size only the data knows."""
    monkeypatch.chdir(tmp_path)
    data(tmp_path)
    text = LOCAL + "fish_tuning: {budgets: [1.0, 0.5]}\nseeds: [1, 2]\nlora: {fish_rank: 12}"
    found = plan(load_config(written(tmp_path, text)))
    # Rank 8 on PEFT's own choice for BERT, query and value, and a head of 3 x 128 + 3.
    lora = 2 * 2 * 8 * (128 + 128) + 3 * 128 + 3
    total = 4_385_920 + lora
    assert found.num_labels == 3
    assert found.train_examples == 45
    assert found.steps == 9
    assert found.arms[0] == PlannedArm("Original LoRA", None, lora, total)
    assert [(arm.name, arm.ratio, arm.trainable) for arm in found.arms[1:]] == [
        (f"LoRA-FISH{kind}", ratio, round(ratio * lora))
        for ratio in (1.0, 0.5)
        for kind in ("", "-rand", "-rev")
    ]
    assert found.num_runs == 14


def test_memory_of_every_arm(tmp_path, monkeypatch):
    """Guards a table that fits a terminal, and parts that add up to the total."""
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, "dataset: {load_args: [imdb], num_labels: 2}")
    result = CliRunner().invoke(
        main, ["plan", str(path), "--memory", "--devices", "2", "--engine", "zero2"]
    )
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    head, _, table = result.stdout.partition("GiB on each of 2 GPUs with zero2")
    assert head and table
    numbers = [re.findall(r"\d+\.\d\d", line) for line in table.splitlines()]
    rows = [[float(number) for number in row] for row in numbers if row]
    # Only an arm that computes Fisher information of its own scores.
    assert [len(row) for row in rows] == [5, 6, 5, 6]
    for weights, trained, optimizer, step, training, *_ in rows:
        assert training == pytest.approx(weights + trained + optimizer + step, abs=0.021)


T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 100,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 100,
}
CLASSES = "dataset: {load_args: [imdb], num_labels: 2}"
TEXTS = "dataset: {task: causal_lm, path: d.txt}"


@pytest.mark.parametrize(
    ("model", "text", "options", "message"),
    [
        (BERT_TINY, CLASSES, ["--devices", "8"], "--devices: 8 is for estimates of memory; add"),
        (BERT_TINY, CLASSES, ["--engine", "zero2"], "--engine: zero2 is for estimates"),
        (BERT_TINY, CLASSES, ["--memory", "--devices", "1000000000"], "--devices"),
        (
            BERT_TINY,
            CLASSES + "\ntraining: {max_seq_length: 513}",
            [],
            r"max_seq_length: 513 is more than the 512 tokens that '.*' takes; lower it",
        ),
        (
            BERT_TINY,
            CLASSES + "\ntraining: {args_override: {optim: adafactor}}",
            ["--memory"],
            "args_override.optim: the memory of 'adafactor' is not known; plan without --memory",
        ),
        (T5, CLASSES, ["--memory"], "cannot be trained so: .*decoder_start_token_id"),
    ],
)
def test_what_a_plan_refuses(tmp_path, model, text, options, message):
    """Guards against options without an effect, tracebacks, and numbers of steps that fail."""
    path = written(tmp_path, text)
    model_folder(tmp_path / "m", model)
    result = CliRunner().invoke(main, ["plan", str(path), *options])
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))


def test_a_step_without_an_estimate(tmp_path, capfd):
    """Guards the other numbers where a step cannot be estimated, and one line that says why."""
    path = written(tmp_path, TEXTS + "\nlora: {target_modules: [q_proj]}")
    model_folder(tmp_path / "m", MIXTRAL)
    result = CliRunner().invoke(main, ["plan", str(path), "--memory"])
    assert result.exit_code == 0, result.output
    (note,) = [line for line in result.stderr.splitlines() if "No estimate" in line]
    assert "which cannot be run without weights: " in note
    assert "Traceback" not in result.stderr + capfd.readouterr().err
    row = next(
        line for line in result.stdout.splitlines() if "Original LoRA" in line and "n/a" in line
    )
    assert len(re.findall(r"\d+\.\d\d", row)) == 3


def test_counts_of_other_arms(tmp_path, monkeypatch):
    """Guards dense LoRA, LoRA-FA and peers, which have no budget."""
    monkeypatch.chdir(tmp_path)
    text = (
        "dataset: {load_args: [imdb]}\n"
        "lora: {baseline_rank: 2, fish_rank: 4, target_modules: [query]}\n"
        "fish_tuning: {methods_to_run: [Original LoRA, LoRA (FISH rank), LoRA-FA]}\n"
        "peers: [{method: IA3, config: {feedforward_modules: []}}]\n"
    )
    found = plan(load_config(written(tmp_path, text)))
    head = 2 * 128 + 2
    assert {arm.name: arm.trainable - head for arm in found.arms} == {
        "Original LoRA": 2 * 2 * 256,
        "LoRA (FISH rank)": 2 * 4 * 256,
        "LoRA-FA": 2 * 4 * 128,
        "IA3": 2 * 128,
    }


def test_broken_data_is_no_matter_where_labels_are_known(tmp_path, monkeypatch):
    """Guards plans before the data is there: the counts stand, the steps say why they do not."""
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, "dataset: {path: data.csv, num_labels: 2}")
    result = CliRunner().invoke(main, ["plan", str(path)])
    assert result.exit_code == 0, result.output
    assert "unknown: dataset.path: there is no file 'data.csv'" in result.stdout
    assert "unknown, as they depend on the number of examples" in result.stdout


def test_unknown_number_of_labels(tmp_path, monkeypatch):
    """Guards against a plan that guesses the size of the head."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no file 'data\.csv'.*, or set dataset\.num_labels to"):
        plan(load_config(written(tmp_path, LOCAL)))


def test_bound_where_examples_are_not_counted(tmp_path):
    """Guards against a bound that is shown as if it were the number."""
    text = "dataset: {load_args: [imdb], max_train_samples: 100}"
    result = CliRunner().invoke(main, ["plan", str(written(tmp_path, text))])
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "training examples at most 100" in lines
    assert "optimizer steps at most 21 per run, on one device" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {target_modules: [qury]}", r"lora\.target_modules: \['qury'\] does not fit"),
        (
            "lora: {target_modules: [query, valu]}",
            r"no module 'valu', did you mean 'value'\?; its linear modules are .*key, query, value",
        ),
        (
            "peers: [{method: LORA, config: {target_modules: [key, q_proj]}}]",
            r"peers: LORA: \['key', 'q_proj'\] does not fit .*: the model has no module 'q_proj'; ",
        ),
        (
            "fish_tuning: {prune_to_ratio_of_baseline: 0.00001}",
            r"prune_to_ratio_of_baseline: 1e-05 of the baseline is 0 parameters.*from 1 to",
        ),
        ("lora: {baseline_rank: 16, fish_rank: 4}", r"lora\.fish_rank 4 .* do not allow"),
        ("peers: [{method: IA3, config: {r: 2}}]", r"peers: IA3: IA3Config has no 'r'"),
    ],
)
def test_what_only_the_model_can_refuse(tmp_path, text, message):
    """Guards adapters and budgets that do not fit the model against a failure after hours."""
    path = written(tmp_path, "dataset: {load_args: [imdb]}\n" + text)
    result = CliRunner().invoke(main, ["plan", str(path)])
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))


@pytest.mark.parametrize(
    ("args", "examples"),
    [
        ({}, 1),
        ({}, 100),
        ({"num_train_epochs": 0.5}, 100),
        ({"num_train_epochs": 2.5, "per_device_train_batch_size": 7}, 100),
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}, 50),
        ({"gradient_accumulation_steps": 30}, 50),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 16}, 50),
        ({"max_steps": 7}, 50),
    ],
)
def test_steps_are_those_of_the_trainer(tmp_path, args, examples):
    """Guards the rounding of steps against transformers' own."""
    import torch
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        torch.nn.Linear(1, 1),
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **args),
        train_dataset=[{"x": 0.0}] * examples,
        data_collator=list,
    )
    loader = trainer.get_train_dataloader()
    assert (
        optimizer_steps(args, examples)
        == trainer.set_initial_training_values(trainer.args, loader)[-1]
    )


def test_steps_that_need_no_examples():
    """Guards max_steps, which holds whatever the data, and steps that are made up."""
    assert optimizer_steps({"max_steps": 10}, None) == 10
    assert optimizer_steps({}, None) is None
