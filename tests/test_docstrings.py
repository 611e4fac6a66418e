"""The examples in the docstrings of public names, run on a tiny model."""

import doctest

import peft
import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import fish_tuning
from tests.models import batches_of, examples_for, tiny_bert, with_lora
from tests.training import random_mask

FINDER = doctest.DocTestFinder(recurse=False)
WITHOUT = {"get_mask", "load_packed", "save_as_peft_adapter", "unpack"}
"""Their examples stand where they are used with others, or in the guide."""


@pytest.mark.parametrize("name", fish_tuning.__all__)
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    """Guards examples that do not run as they are printed, and public names without one."""
    monkeypatch.chdir(tmp_path)
    base = tiny_bert(num_labels=2)
    model = with_lora(base)
    assert isinstance(model, PeftModel)
    data = examples_for(model, 8, shortest=5, longest=5)
    loader = batches_of(data, 4)
    names = {name: getattr(fish_tuning, name) for name in fish_tuning.__all__} | {
        "LoraConfig": peft.LoraConfig,
        "Trainer": Trainer,
        "arguments": TrainingArguments("output", max_steps=1, use_cpu=True, report_to="none"),
        "base": tiny_bert(num_labels=2),
        "data": data,
        "get_peft_model": peft.get_peft_model,
        "loader": loader,
        "mask": fish_tuning.FishMask(random_mask(model)),
        "model": model,
        "scores": fish_tuning.score_with_perturbed_b(model, loader, progress=False),
        "torch": torch,
    }
    (test,) = FINDER.find(names[name], name, globs=names)
    assert bool(test.examples) != (name in WITHOUT)
    printed = []
    # A Trainer prints what it logs, which is not part of an example.
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_ONLY_FIRST_FAILURE)
    monkeypatch.setattr(Trainer, "log", lambda *args, **kwargs: None)
    runner.run(test, out=printed.append)
    assert not runner.failures, "".join(printed)
