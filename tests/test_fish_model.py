"""get_fish_model: settings in, a masked model with the exact count out."""

import pytest
import torch

from fish_tuning import (
    FishConfig,
    FishMask,
    calculate_fisher_information,
    get_fish_model,
    get_mask,
)
from tests.models import batches_of, examples_for, tiny_bert, with_lora


def model_and_loader():
    model = with_lora(tiny_bert())
    return model, batches_of(examples_for(model, 8), 4)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Untouched:
    """A loader that must not be asked for a batch."""

    def __iter__(self):
        raise AssertionError("the loader was iterated")


HEAD = 3 * 12 + 3


@pytest.mark.parametrize("criterion", ["fisher", "reversed", "random", "magnitude"])
@pytest.mark.parametrize("scope", ["balanced", "global", "per_tensor"])
def test_three_lines_give_the_exact_count(scope, criterion):
    """Guards against a count that is nearly, but not quite, what was asked for."""
    model, loader = model_and_loader()
    dense = sum(p.numel() for p in trainable(model).values())
    config = FishConfig(num_trainable=200, scope=scope, criterion=criterion)
    assert get_fish_model(model, config, loader, progress=False) is model
    assert sum(p.numel() for p in trainable(model).values()) == 200
    assert model.get_nb_trainable_parameters()[0] == 200
    assert get_mask(model).num_trainable == 200
    head = {n: bits for n, bits in get_mask(model).items() if "modules_to_save" in n}
    assert sum(int(bits.sum()) for bits in head.values()) == HEAD

    model, loader = model_and_loader()
    config = FishConfig(keep_ratio=0.3, scope=scope, criterion=criterion)
    get_fish_model(model, config, loader, progress=False)
    count = round(0.3 * (dense - HEAD)) + HEAD
    assert sum(p.numel() for p in trainable(model).values()) == count
    model(**loader[0]).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_the_default_picks_from_both_sides():
    """Guards against LoRA's zero start, at which only B has a score."""
    model, loader = model_and_loader()
    mask = get_mask(get_fish_model(model, FishConfig(num_trainable=200), loader, progress=False))
    a, b = (
        sum(int(t.sum()) for n, t in mask.items() if side in n) for side in ("lora_A", "lora_B")
    )
    assert abs(a - b) <= 1
    assert a + b == 200 - HEAD
    model, loader = model_and_loader()
    config = FishConfig(num_trainable=200, scope="global", scoring_point="start")
    mask = get_mask(get_fish_model(model, config, loader, progress=False))
    assert sum(int(t.sum()) for n, t in mask.items() if "lora_B" in n) == 200 - HEAD


def test_scoring_changes_nothing_but_the_mask():
    """Guards against the perturbed B, or gradients, that stay in the model."""
    model, loader = model_and_loader()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    get_fish_model(model, FishConfig(keep_ratio=0.3), loader, progress=False)
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_criteria_that_need_no_loader(criterion):
    """Guards against asking for data that is not looked at."""
    model, _ = model_and_loader()
    config = FishConfig(num_trainable=100, criterion=criterion)
    assert get_mask(get_fish_model(model, config)).num_trainable == 100
    model, _ = model_and_loader()
    get_fish_model(model, config, Untouched())


@pytest.mark.parametrize("criterion", ["fisher", "reversed"])
def test_criteria_that_need_a_loader(criterion):
    """Guards against an error from deep within when the loader is forgotten."""
    model, _ = model_and_loader()
    with pytest.raises(ValueError, match=f"criterion='{criterion}' needs a calibration_dataloader"):
        get_fish_model(model, FishConfig(keep_ratio=0.5, criterion=criterion))
    assert get_mask(model) is None


@pytest.mark.parametrize("estimator", ["empirical", "true"])
@pytest.mark.parametrize("criterion", ["fisher", "random"])
def test_same_config_gives_the_same_mask(criterion, estimator):
    """Guards against a draw that the seed does not govern, and a seed that governs nothing."""
    masks = []
    for seed in (0, 0, 1):
        model, loader = model_and_loader()
        torch.manual_seed(len(masks))
        config = FishConfig(num_trainable=200, criterion=criterion, estimator=estimator, seed=seed)
        masks.append(get_mask(get_fish_model(model, config, loader, progress=False)))
    assert masks[0] == masks[1]
    assert masks[0] != masks[2]


def test_the_estimator_is_used():
    """Guards against a true Fisher that is in fact the empirical one."""
    masks = []
    for estimator in ("empirical", "true"):
        model, loader = model_and_loader()
        config = FishConfig(num_trainable=200, estimator=estimator)
        masks.append(get_mask(get_fish_model(model, config, loader, progress=False)))
    assert masks[0] != masks[1]


@pytest.mark.parametrize("scope", ["balanced", "global", "per_tensor"])
def test_reversed_picks_the_opposite(scope):
    """Guards against a reversed arm that overlaps with Fisher's choice."""
    masks = []
    for criterion in ("fisher", "reversed"):
        model = with_lora(tiny_bert(), init_lora_weights=False)
        loader = batches_of(examples_for(model, 8), 4)
        config = FishConfig(keep_ratio=0.5, criterion=criterion, scope=scope, scoring_point="start")
        masks.append(get_mask(get_fish_model(model, config, loader, progress=False)))
    names = [name for name in masks[0] if "lora_" in name]
    same = sum(int((masks[0][n] == masks[1][n]).sum()) for n in names)
    assert same <= 1
    assert sum(int(masks[0][n].sum()) for n in names) > 300


def test_num_samples_limits_what_is_scored():
    """Guards against a setting that is read and not used."""
    model = with_lora(tiny_bert(), init_lora_weights=False)
    loader = batches_of(examples_for(model, 8), 4)
    options = {"keep_ratio": 0.2, "scoring_point": "start", "scope": "global"}
    scores = calculate_fisher_information(model, loader[:1], progress=False)
    pool = torch.cat([s.flatten() for n, s in scores.items() if "lora_" in n])
    threshold = pool.topk(round(0.2 * pool.numel())).values.min()
    get_fish_model(model, FishConfig(**options, num_samples=4), loader, progress=False)
    for name, bits in get_mask(model).items():
        if "lora_" in name:
            assert torch.equal(bits, scores[name] >= threshold), name
    whole = with_lora(tiny_bert(), init_lora_weights=False)
    get_fish_model(whole, FishConfig(**options, num_samples=None), loader, progress=False)
    assert get_mask(whole) != get_mask(model)


def test_names_to_exclude_and_loss_fn_are_passed_on():
    """Guards against arguments that stop at the door."""
    model, loader = model_and_loader()
    config = FishConfig(keep_ratio=0.2, names_to_exclude=("modules_to_save", r"layer\.1\."))
    called = []

    def loss_fn(outputs, batch):
        called.append(len(batch["labels"]))
        return outputs.logits.square().sum(1)

    get_fish_model(model, config, loader, loss_fn=loss_fn, progress=False)
    assert sum(called) >= 8
    for name, bits in get_mask(model).items():
        assert bits.all() == ("modules_to_save" in name or "layer.1." in name), name


def test_provenance_is_the_config():
    """Guards against a mask that does not say how it was made."""
    config = FishConfig(
        num_trainable=800,
        scope="per_tensor",
        criterion="random",
        estimator="true",
        num_samples=None,
        seed=3,
        names_to_exclude=("modules_to_save", "lora_A"),
    )
    model, _ = model_and_loader()
    mask = get_mask(get_fish_model(model, config))
    recorded = {key: mask.provenance[key] for key in FishConfig.model_fields}
    assert FishConfig(**recorded) == config


def test_provenance_is_saved(tmp_path):
    """Guards against a saved mask that does not say how it was made."""
    model, loader = model_and_loader()
    get_fish_model(model, FishConfig(keep_ratio=0.25, seed=7), loader, progress=False)
    model.save_pretrained(tmp_path)
    provenance = FishMask.from_pretrained(tmp_path).provenance
    assert (provenance["keep_ratio"], provenance["seed"]) == (0.25, 7)
    assert provenance["criterion"] == "fisher"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_trainable": HEAD}, r"num_trainable=39 must be an integer from 40 to"),
        ({"num_trainable": 10**6}, r"num_trainable=1000000 must be an integer from 40 to"),
        ({"keep_ratio": 0.5, "names_to_exclude": (".",)}, "nothing is left to select from"),
        ({"keep_ratio": 0.5, "names_to_exclude": ("(",)}, "not a regular expression"),
    ],
)
def test_impossible_budgets_are_refused_before_scoring(settings, message):
    """Guards against minutes of scoring for a budget that cannot be met."""
    model, _ = model_and_loader()
    with pytest.raises(ValueError, match=message):
        get_fish_model(model, FishConfig(**settings), Untouched(), progress=False)
    assert get_mask(model) is None


def test_masked_model_is_refused_before_scoring():
    """Guards against minutes of scoring for a model that has a mask."""
    model, loader = model_and_loader()
    get_fish_model(model, FishConfig(keep_ratio=0.5), loader, progress=False)
    with pytest.raises(ValueError, match="has a mask already"):
        get_fish_model(model, FishConfig(keep_ratio=0.5), Untouched(), progress=False)


@pytest.mark.parametrize("criterion", ["fisher", "random"])
def test_frozen_model_is_refused(criterion):
    """Guards against a mask of nothing on a model that cannot be trained."""
    model, loader = model_and_loader()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"trainable|requires_grad"):
        get_fish_model(
            model, FishConfig(keep_ratio=0.5, criterion=criterion), loader, progress=False
        )
    assert get_mask(model) is None
