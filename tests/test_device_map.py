"""Models that accelerate has spread over devices, with parts in memory or on disk only."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel

from fish_tuning import apply_mask, get_mask, score_with_perturbed_b
from tests.models import batches_of, examples_for, pad, tiny_bert, with_lora
from tests.parallel import (
    assert_equal_scores,
    assert_identical,
    error_of,
    random_mask,
    scored,
    tensors_of,
    train,
)

PARTS = ["embeddings", "encoder.layer.0", "encoder.layer.1", "pooler"]


def base():
    return tiny_bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0)


def spread(model, folder, where):
    """The model with some parts elsewhere, which hooks bring to the processor in their turn."""
    if where == "all of it":
        return dispatch_model(model, {"": "cpu"}, force_hooks=True)
    device_map = {f"bert.{part}": "cpu" for part in PARTS} | {"dropout": "cpu", "classifier": "cpu"}
    device_map |= dict.fromkeys(("bert.embeddings", "bert.encoder.layer.0"), where)
    return dispatch_model(model, device_map, "cpu", offload_dir=folder, force_hooks=True)


def adapted(model, **settings):
    """LoRA on the layer that is in memory."""
    layer = {"target_modules": ["query", "key", "value", "dense"], "layers_to_transform": [1]}
    settings = {"init_lora_weights": False, "lora_dropout": 0.0, **layer, **settings}
    return with_lora(model, **settings)


@pytest.mark.parametrize("where", ["all of it", "disk"])
def test_scores_and_training(where, tmp_path, recwarn):
    """Guards against batches sent to a device without memory, scores of offloaded weights, and
    tensors that a hook replaces."""
    plain, model = adapted(base()), adapted(spread(base(), tmp_path, where))
    offloaded = [p for p in model.parameters() if p.is_meta]
    assert bool(offloaded) == (where == "disk") and next(model.parameters()).is_meta == bool(
        offloaded
    )
    batches = batches_of(examples_for(plain, 6), 2)
    assert_equal_scores(scored(model, batches), scored(plain, batches))
    by_perturbation = [score_with_perturbed_b(m, batches, progress=False) for m in (model, plain)]
    assert_equal_scores(*by_perturbation)
    mask = random_mask(plain)
    before = tensors_of(plain, mask)
    for each in (plain, model):
        apply_mask(each, mask)
        train(each)
    trained = [tensors_of(each, mask) for each in (plain, model)]
    assert_identical(trained)
    for name, bits in mask.items():
        assert not torch.equal(trained[1][name], before[name]), name
        assert torch.equal(trained[1][name][~bits], before[name][~bits]), name
    assert [p.is_meta for p in model.parameters()].count(True) == len(offloaded)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    state = again.state_dict()
    assert_identical([trained[1], {name: state[name] for name in mask}])


def test_offloaded_adapters_are_refused(tmp_path):
    """Guards against scores and masks of tensors that hold no numbers."""
    mask = random_mask(adapted(base(), layers_to_transform=None))
    some = adapted(spread(base(), tmp_path, "disk"), layers_to_transform=None)
    every = adapted(
        cpu_offload(copy.deepcopy(base()), torch.device("cpu")), layers_to_transform=None
    )
    for model, count in ((some, 12), (every, len(mask))):
        before = dict(model.named_parameters())
        for error in (
            error_of(scored, model, []),
            error_of(score_with_perturbed_b, model, []),
            error_of(apply_mask, model, mask),
        ):
            assert error is not None and error[0] == "ValueError"
            assert error[1].startswith(f"{count} trainable tensors are offloaded (on the meta")
            assert "layer.0.attention.self.query.lora_A" in error[1]
        assert get_mask(model) is None and dict(model.named_parameters()) == before


def test_a_masked_model_is_not_offloaded():
    """Guards against a KeyError, or values that are gone."""
    model = adapted(base())
    apply_mask(model, random_mask(model))
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"cannot be offloaded.*remove_mask"):
        model(**pad(examples_for(model, 2)))
