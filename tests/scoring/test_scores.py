"""Scores with their provenance, and their file."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from fish_tuning import FishScores, calculate_fisher_information, score_with_perturbed_b
from fish_tuning.scoring.scores import SCORES_FILE
from tests.models import batches_of, examples_for, tiny_bert, with_lora


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return FishScores(
        {
            "b": torch.rand(3, 4),
            "a": torch.rand(2, 2, dtype=torch.float64),
            "half": torch.rand(4, 6).bfloat16()[:, ::2],
            "scalar": torch.tensor(2.0),
            "empty": torch.zeros(0, 3),
        },
        provenance={"estimator": "true", "num_examples": 7},
    )


def content_of(folder):
    path = folder / SCORES_FILE
    with safe_open(path, "pt") as file:
        return safetensors.torch.load_file(path), file.metadata()


def rewrite(folder, tensors, **changes):
    _, metadata = content_of(folder)
    record = json.loads(metadata["fish_scores"]) | changes
    safetensors.torch.save_file(tensors, folder / SCORES_FILE, {"fish_scores": json.dumps(record)})


def test_round_trip(scores, tmp_path):
    """Guards against lost values, types, order or provenance, and leftovers beside the file."""
    scores.save_pretrained(tmp_path / "x")
    loaded = FishScores.from_pretrained(tmp_path / "x")
    assert list(loaded) == list(scores) and loaded.provenance == scores.provenance
    for name, tensor in scores.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    assert os.listdir(tmp_path / "x") == [SCORES_FILE]
    copied = pickle.loads(pickle.dumps(scores))
    assert copied.provenance == scores.provenance and list(copied) == list(scores)


def test_what_made_them():
    """Guards scores whose file does not say which they are."""
    model = with_lora(tiny_bert())
    batches = batches_of(examples_for(model, 5), 2)
    scores = calculate_fisher_information(
        model, batches, estimator="true", num_samples=3, seed=4, progress=False
    )
    wanted = {"estimator": "true", "num_examples": 3, "seed": 4, "scoring_point": "start"}
    assert scores.provenance.items() >= wanted.items()
    perturbed = score_with_perturbed_b(model, batches, std=1e-2, progress=False)
    wanted = {"num_examples": 5, "scoring_point": "perturbed", "std": 1e-2}
    assert perturbed.provenance.items() >= wanted.items()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, t: (folder / SCORES_FILE).write_bytes(b"nothing"), "not a complete safe"),
        (
            lambda folder, t: safetensors.torch.save_file(t, folder / SCORES_FILE),
            "is not a file th",
        ),
        (lambda folder, t: rewrite(folder, t | {"b": t["b"] + 1}), "do not have the sha256"),
        (lambda folder, t: rewrite(folder, {"b": t["b"]}), "its record lists other tensors"),
        (lambda folder, t: rewrite(folder, t, names=["b", "b"]), "its record lists other tensors"),
        (lambda folder, t: rewrite(folder, t, names=3), "its record is wrong at names"),
        (lambda folder, t: rewrite(folder, t, format_version=2), "has format_version 2, but this"),
    ],
)
def test_damaged(scores, tmp_path, damage, message):
    """Guards against wrong scores that are read without a word."""
    scores.save_pretrained(tmp_path)
    tensors, _ = content_of(tmp_path)
    damage(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"{SCORES_FILE} .*{message}"):
        FishScores.from_pretrained(tmp_path)


def test_missing_file(tmp_path):
    """Guards the message about a folder without scores."""
    with pytest.raises(FileNotFoundError, match=r"holds no complete scores\. Name the folder that"):
        FishScores.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "provenance", "message"),
    [
        ({"a": torch.ones(2).bool()}, {}, r"The scores of a are torch\.bool: give floating-point"),
        ({"a": [1.0]}, {}, "The scores of a are list"),
        ({"a": torch.ones(2)}, {"x": torch.ones(1)}, "must fit in JSON"),
    ],
)
def test_refused(tensors, provenance, message):
    """Guards against scores that cannot be ranked or saved."""
    with pytest.raises(ValueError, match=message):
        FishScores(tensors, provenance=provenance)
