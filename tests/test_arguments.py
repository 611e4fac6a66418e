"""Arguments of the wrong type or out of range: one sentence, with the way out."""

import pytest
import torch
from peft import get_peft_model

from fish_tuning import (
    FishConfig,
    FishMask,
    FishScores,
    FishTuningCallback,
    FishTuningTrainer,
    apply_mask,
    calculate_fisher_information,
    compare_scores,
    create_mask_from_fisher,
    create_ranks_from_fisher,
    get_fish_model,
    get_mask,
    load_packed,
    magnitude_scores,
    pack,
    random_scores,
    remove_mask,
    reversed_scores,
    save_as_peft_adapter,
    score_with_perturbed_b,
)
from fish_tuning.arguments import check_integer
from tests.models import batches_of, examples_for, tiny_bert, tiny_llama, with_lora

CONFIG = FishConfig(keep_ratio=0.5)
SCORES = "calculate_fisher_information returns it"
MASK = r"give FishMask\.from_pretrained\('adapter'\)"
MODEL = r"model is a str 'bert': give a model, .*\.from_pretrained\('bert'\)"


@pytest.fixture(scope="module")
def model():
    return with_lora(tiny_bert())


@pytest.fixture(scope="module")
def batches(model):
    return batches_of(examples_for(model, 4), 2)


@pytest.mark.parametrize("wrong", [[torch.ones(3)], torch.ones(3), None, "scores"])
@pytest.mark.parametrize(
    "call",
    [
        lambda wrong: create_mask_from_fisher(wrong, 0.1),
        lambda wrong: create_ranks_from_fisher(wrong, 10),
        lambda wrong: compare_scores(wrong, {}),
        lambda wrong: compare_scores({}, wrong),
        reversed_scores,
        FishScores,
        lambda wrong: random_scores(wrong, 0),
    ],
)
def test_scores(call, wrong):
    """Guards scores of another kind against errors from deep inside."""
    with pytest.raises(TypeError, match=rf"is a \w+.*: give a dict of tensors .*{SCORES}"):
        call(wrong)


@pytest.mark.parametrize(
    "call",
    [
        FishMask,
        lambda wrong: apply_mask(with_lora(tiny_bert()), wrong),
        FishTuningCallback,
        lambda wrong: FishTuningTrainer(tiny_bert(), mask=wrong),
    ],
)
def test_masks(call, tmp_path):
    """Guards a path in place of a mask, and other things."""
    with pytest.raises(TypeError, match=MASK):
        call("adapter")
    with pytest.raises(TypeError, match=r"give FishMask\.from_pretrained\('/"):
        call(tmp_path)
    with pytest.raises(TypeError, match="is a list: give a FishMask, or a dict of boolean"):
        call([1])


@pytest.mark.parametrize(
    "call",
    [
        lambda m: calculate_fisher_information(m, []),
        lambda m: score_with_perturbed_b(m, []),
        lambda m: get_fish_model(m, CONFIG, []),
        lambda m: apply_mask(m, {}),
        get_mask,
        remove_mask,
        lambda m: load_packed(m, "x"),
        lambda m: save_as_peft_adapter(m, "x", start={}),
    ],
)
def test_models(call):
    """Guards a model's name in place of the model."""
    with pytest.raises(TypeError, match=MODEL):
        call("bert")


def test_other_types(model, batches):
    """Guards each remaining argument that people get wrong."""
    for call, message in (
        (lambda: get_fish_model(model, {"keep_ratio": 1}), r"is a dict: give FishConfig\(\*\*con"),
        (lambda: get_fish_model(model, None), "config is a NoneType: give a FishConfig"),
        (lambda: FishTuningTrainer(model, fish_config={}), "config is a dict: give FishConfig"),
        (lambda: magnitude_scores("bert"), "a str 'bert': give a model, or its weights by name"),
        (lambda: pack(model, "x"), "folder is a PeftModel.*: give the folder of a saved adapter"),
        (lambda: random_scores({}, "a"), "seed is a str 'a': give an integer"),
        (lambda: create_ranks_from_fisher({}, "9"), "budget is a str '9': give an integer"),
        (
            lambda: score_with_perturbed_b(model, batches, std="a"),
            "std is a str 'a': give a number above 0",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for options, message in (
        ({"seed": "a"}, "seed is a str 'a': give an integer"),
        ({"num_samples": 2.5}, r"num_samples is a float 2\.5: give an integer"),
    ):
        for score in (calculate_fisher_information, score_with_perturbed_b):
            with pytest.raises(TypeError, match=message):
                score(model, batches, progress=False, **options)


def test_a_fish_config_is_no_adapter():
    """Guards PEFT's own function against a config that is not PEFT's."""
    with pytest.raises(TypeError, match=r"a FishConfig is not .* get_peft_model\(model, LoraConf"):
        get_peft_model(tiny_bert(), CONFIG)
    assert not hasattr(CONFIG, "peft_type")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5])
def test_devices(model, batches, device):
    """Guards torch's list of every device that it has heard of."""
    with pytest.raises(ValueError, match=rf"device={device!r} cannot be used: name one that this"):
        calculate_fisher_information(model, batches, device=device, progress=False)


@pytest.mark.parametrize(
    ("build", "label", "classes"),
    [
        (tiny_bert, 7, 3),
        (lambda: tiny_bert(num_labels=2), -5, 2),
        (lambda: tiny_bert(task="TokenClassification"), 7, 3),
        (tiny_llama, 700, 40),
    ],
)
@pytest.mark.parametrize("batch", [0, 1])
def test_labels(build, label, classes, batch):
    """Guards labels that are no classes, in the batch that is looked at first and in another."""
    model = with_lora(build())
    batches = [dict(b) for b in batches_of(examples_for(model, 4), 2)]
    labels = batches[batch]["labels"].clone()
    labels.reshape(2, -1)[:, -1] = label
    batches[batch]["labels"] = labels
    message = f"label {label} is not one of the model's {classes} classes, 0 to {classes - 1}: "
    with pytest.raises(ValueError, match=message):
        calculate_fisher_information(model, batches, progress=False)


def test_integers():
    """Guards numpy's integers, and bools, which Python counts among the integers."""
    check_integer("n", torch.ones(2).numpy().astype(int)[0], 1)
    with pytest.raises(TypeError, match="n is a bool True: give an integer"):
        check_integer("n", True)
    with pytest.raises(ValueError, match="n=0: must be at least 1"):
        check_integer("n", 0, 1)
