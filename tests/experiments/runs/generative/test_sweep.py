"""Experiments with language models, from a YAML's sections to the records of their runs."""

import json
import math

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics.texts import text_metrics
from fish_tuning.experiments.models.load import load_tokenizer
from fish_tuning.experiments.report.method_comparison import write_method_comparison
from fish_tuning.experiments.report.pages import markdown_report
from fish_tuning.experiments.report.results_csv import csv_table
from fish_tuning.experiments.runs.preflight import check_experiment
from fish_tuning.experiments.runs.prepare import prepare
from fish_tuning.experiments.runs.sweep import run_experiment
from tests.experiments.tiny_language_model import generative, language_model, write_pairs

ARGS = {"max_steps": 4, "eval_steps": 2, "save_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny language model and data for it."""
    path = tmp_path_factory.mktemp("generative")
    language_model(path / "model")
    write_pairs(path / "pairs.jsonl")
    (path / "other.txt").write_text("w1 w2 w3 <end>\nw4 w5 <end>\n" * 9, encoding="utf-8")
    return path


def pairs(folder, output_dir, **changes):
    """An experiment on prompts and completions that measures everything there is."""
    sections = {
        "training": {"args_override": ARGS},
        "generation": {
            "metrics": ["exact_match", "bleu", "rouge_l"],
            "answer_pattern": r"#### (\d)",
            "max_new_tokens": 6,
        },
        "evaluation_sets": {"other": {"path": str(folder / "other.txt")}},
        **changes,
    }
    return generative(folder / "model", folder / "pairs.jsonl", output_dir, **sections)


@pytest.fixture(scope="module")
def results(folder):
    """The four default arms, trained for four steps."""
    return run_experiment(pairs(folder, folder / "out"), name="pairs")


def plain_loop(model, rows):
    """Loss per token, one example at a time."""
    total, tokens = 0.0, 0
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, label in enumerate(labels[1:]):
            if label != -100:
                total -= float(logits[place, label])
                tokens += 1
    return total / tokens


def test_every_arm_trains_its_budget(results):
    """Guards the counts, and the records of what only language models have."""
    assert [run.status for run in results.runs] == ["finished"] * 4, results.runs[0].error
    for run in results.runs:
        assert run.trainable_params == run.budget == 448
        assert 0 < run.changed_params <= 448
        assert run.main_metric == "eval_loss"
        assert {"other_loss", "other_perplexity", "token_accuracy"} <= run.metrics_before.keys()
        assert run.metrics["eval_loss"] != run.metrics_before["eval_loss"]
    befores = [run.metrics_before for run in results.runs]
    assert befores == [befores[0]] * 4


def test_loss_and_perplexity_are_those_of_a_plain_loop(folder, results):
    """Guards against means over batches, which depend on their size."""
    config = pairs(folder, folder / "unused")
    prepared = prepare(check_experiment(config))
    for run in results.runs[:2]:
        model = AutoPeftModelForCausalLM.from_pretrained(folder / "out" / run.adapter)
        for rows, name in ((prepared.validation, "eval"), (prepared.further["other"], "other")):
            loss = plain_loop(model.eval(), rows)
            assert run.metrics[f"{name}_loss"] == pytest.approx(loss, rel=1e-5)
            key = "perplexity" if name == "eval" else "other_perplexity"
            assert run.metrics[key] == pytest.approx(math.exp(loss), rel=1e-5)


def test_metrics_are_those_of_the_texts_that_are_kept(folder, results):
    """Guards against texts in another order than their references."""
    tokenizer = load_tokenizer(pairs(folder, folder / "unused").model)
    for run in results.runs[:2]:
        file = folder / "out" / "runs" / run.run_id / "generations.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        texts = [row["generated"] for row in rows]
        references = [row["references"] for row in rows]
        names = ("exact_match", "bleu", "rouge_l")
        expected = text_metrics(names, texts, references, r"#### (\d)")
        assert {name: run.metrics[name] for name in names} == expected
        assert run.example.after == texts[0]
        assert run.example.prompt == rows[0]["prompt"]
        model = AutoPeftModelForCausalLM.from_pretrained(folder / "out" / run.adapter)
        ids = torch.tensor([tokenizer(rows[1]["prompt"])["input_ids"]])
        alone = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True) == texts[1]


def test_reports_show_texts_and_forgetting(folder, results, tmp_path):
    """Guards columns and files that only language models have."""
    page = markdown_report([results])
    first = results.runs[0]
    arrow = f"{first.metrics_before['other_loss']:.4f} → {first.metrics['other_loss']:.4f}"
    assert "other: Loss" in page and arrow in page
    assert f"Original LoRA, after training: {first.example.after}" in page
    assert "metrics_before.other_perplexity" in csv_table([results]).splitlines()[0]
    files = write_method_comparison(results, folder / "out", tmp_path)
    entry = json.loads(files[1].read_text(encoding="utf-8"))
    last = entry["train_info"]["metrics"][-1]
    assert last["test accuracy"] == results.runs[1].metrics["exact_match"]
    change = results.runs[1].metrics["other_loss"] - results.runs[1].metrics_before["other_loss"]
    assert last["forgetting"] == pytest.approx(change)
    assert entry["run_info"]["peft_config"]["peft_type"] == "LORA"


FORMS = {
    "text": ({"text": "w1 w2 w3 <end>"}, {}),
    "instruction": ({"instruction": "w1", "input": "w2", "output": "w3 <end>"}, {}),
    "template": (
        {"q": "w1 w2", "a": "w3"},
        {"prompt_template": "{q} ", "completion_template": "{a} <end>"},
    ),
    "chat": (
        {
            "messages": [
                {"role": "user", "content": "w1 w2"},
                {"role": "assistant", "content": "w3 w4"},
            ]
        },
        {},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_trained(form, folder, tmp_path):
    """Guards each form, with the options of SFTConfig that change how it is trained."""
    row, keys = FORMS[form]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([json.dumps(row)] * 20), encoding="utf-8")
    options = {
        "text": {"packing": True},
        "instruction": {"padding_free": True},
        "template": {"bf16": True, "gradient_checkpointing": True},
        "chat": {"assistant_only_loss": True},
    }[form]
    generation = {} if form == "text" else {"generation": {"max_new_tokens": 4, "max_prompts": 1}}
    config = generative(
        folder / "model",
        data,
        tmp_path / "out",
        dataset=keys,
        training={"args_override": {**ARGS, **options}},
        fish_tuning={"methods_to_run": ["LoRA-FISH"]},
        **generation,
    )
    (run,) = run_experiment(config, name=form).runs
    assert run.status == "finished", run.error
    assert run.trainable_params == run.budget and run.changed_params <= run.budget
    assert run.metrics["eval_loss"] < run.metrics_before["eval_loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"args_override": {"assistant_only_loss": True}}},
            r"args_override\.assistant_only_loss: the data is prompt and completion, not chat",
        ),
        (
            {"generation": {"metrics": ["exact_match"], "answer_pattern": r"answer: (\d)"}},
            r"generation\.answer_pattern: .* does not occur in the completion of validation row 1",
        ),
        (
            {"evaluation_sets": {"other": {"path": "gone.txt"}}},
            r"^evaluation_sets\.other\.path: there is no file 'gone\.txt'",
        ),
        ({"dataset": {"validation": {"path": "gone.csv"}}}, r"^dataset\.validation\.path: "),
    ],
)
def test_mistakes_are_told_before_any_work(changes, message, folder, tmp_path):
    """Guards against a sweep that fails, or means something else, after hours."""
    with pytest.raises(ConfigError, match=message) as raised:
        check_experiment(pairs(folder, tmp_path / "out", **changes))
    assert len(raised.value.problems) == 1
    assert not (tmp_path / "out").exists()
