"""Two adapters in one model, each with a mask of its own, against models with one of them."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from fish_tuning import FishMask, apply_mask, get_mask, remove_mask
from tests.sparse.twins import (
    CONFIGS,
    assert_both_close,
    assert_close,
    base_model,
    config_of,
    copied,
    dense_model,
    inputs,
    loss_of,
    output_of,
    random_bits,
    seeded,
    tensor_of,
)

NAMES = ("default", "other")
SHARED = "vera"
"""A method whose adapters share projections, which deleting one of them leaves alone."""


def alone(kind, adapter):
    """A model that has one adapter, with the same numbers as in the model that has both."""
    seed = 1 + NAMES.index(adapter)
    return seeded(
        lambda: get_peft_model(base_model(kind), config_of(kind), adapter_name=adapter), seed
    ).double()


def both(kind):
    model = alone(kind, "default")
    model.add_adapter("other", config_of(kind))
    single = alone(kind, "other").state_dict()
    state = {name: tensor for name, tensor in single.items() if ".other" in name}
    model.double().load_state_dict(state, strict=False)
    return model


class Adapters:
    """The model with both adapters and, for each of them, one that has nothing else."""

    def __init__(self, kind):
        self.both, self.bits, self.alone = both(kind), {}, {}
        for seed, adapter in enumerate(NAMES):
            self.alone[adapter] = alone(kind, adapter)
            self.both.set_adapter(adapter)
            self.bits[adapter] = random_bits(self.alone[adapter], 2 * seed + 1)
            apply_mask(self.alone[adapter], self.bits[adapter])
            apply_mask(self.both, self.bits[adapter])
        self.optimizers = {}

    def train(self, adapter, steps=2):
        self.both.set_adapter(adapter)
        models = self.both, self.alone[adapter]
        if adapter not in self.optimizers:
            self.optimizers[adapter] = [
                torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 0.02)
                for m in models
            ]
        for model, optimizer in zip(models, self.optimizers[adapter], strict=True):
            for i in range(steps):
                loss_of(model.eval(), inputs(i)).backward()
                optimizer.step()
                optimizer.zero_grad()

    def assert_as_alone(self, *adapters, model=None):
        model = self.both if model is None else model
        state = model.state_dict()
        for adapter in adapters or NAMES:
            model.set_adapter(adapter)
            for name, tensor in self.alone[adapter].state_dict().items():
                assert_close(state[name], tensor, name)
            with torch.no_grad():
                outputs = [output_of(m.eval(), inputs(7)) for m in (model, self.alone[adapter])]
            assert_both_close(outputs, adapter)
            trained = [
                {n for n, p in m.named_parameters() if p.requires_grad}
                for m in (model, self.alone[adapter])
            ]
            assert trained[0] == trained[1]


@pytest.fixture(params=CONFIGS)
def adapters(request):
    """Two adapters of each kind, trained in turn."""
    found = Adapters(request.param)
    for adapter in ("default", "other", "default"):
        found.train(adapter)
    return found


def test_trained_in_turn_and_switched(adapters):
    """Guards against one adapter's steps, or its optimizer, that move the other."""
    adapters.assert_as_alone()
    adapters.train("other")
    adapters.train("default")
    adapters.assert_as_alone()


def test_the_mask_of_each(adapters):
    """Guards against masks that mix, or that one adapter hides from the other."""
    for adapter, bits in adapters.bits.items():
        assert get_mask(adapters.both, adapter) == FishMask(bits)
        assert get_mask(adapters.alone[adapter]) == FishMask(bits)
    assert get_mask(adapters.both) == FishMask(adapters.bits["default"] | adapters.bits["other"])


@pytest.mark.parametrize("deleted", NAMES)
def test_one_is_deleted(adapters, deleted):
    """Guards against a deleted adapter that takes the other's mask along."""
    kept = next(name for name in NAMES if name != deleted)
    adapters.both.delete_adapter(deleted)
    adapters.assert_as_alone(kept)
    assert get_mask(adapters.both) == FishMask(adapters.bits[kept])
    assert not any(f".{deleted}" in name for name in adapters.both.state_dict())
    adapters.train(kept)
    adapters.assert_as_alone(kept)


def test_saved_and_loaded(adapters, tmp_path, request):
    """Guards against folders whose mask is of the other adapter, or of both."""
    kind = request.node.callspec.params["adapters"]
    adapters.both.save_pretrained(tmp_path)
    folders = {"default": tmp_path, "other": tmp_path / "other"}
    model = PeftModel.from_pretrained(base_model(kind), tmp_path, is_trainable=True)
    model.load_adapter(folders["other"], "other", is_trainable=True)
    for adapter, folder in folders.items():
        mask = FishMask.from_pretrained(folder)
        assert mask == FishMask(adapters.bits[adapter])
        model.set_adapter(adapter)
        apply_mask(model, mask)
    adapters.both, adapters.optimizers = model, {}
    adapters.assert_as_alone()
    for adapter in NAMES:
        adapters.train(adapter)
    adapters.assert_as_alone()


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_merged_with_weights(how):
    """Guards against a mixture of what the adapters were before they were trained."""
    adapters, plain = Adapters("lora"), both("lora")
    for adapter in ("default", "other"):
        adapters.train(adapter)
    for adapter in NAMES:
        state = adapters.alone[adapter].state_dict()
        plain.load_state_dict({n: t for n, t in state.items() if "lora" in n}, strict=False)
    outputs = []
    for model in (adapters.both, plain):
        model.add_weighted_adapter(list(NAMES), [0.7, 0.3], "mix", combination_type=how)
        model.set_adapter("mix")
        outputs.append(output_of(model, inputs()))
    assert_both_close(outputs, how)
    assert {n for n, p in adapters.both.named_parameters() if ".mix." in n} == {
        n for n, p in plain.named_parameters() if ".mix." in n
    }
    adapters.assert_as_alone()


def test_both_active_at_once():
    """Guards against a forward pass through both that reaches the values of one."""
    adapters, plain = Adapters("lora"), both("lora")
    gradients = []
    for model in (adapters.both, plain):
        model.base_model.set_adapter(list(NAMES))
        loss_of(model.eval(), inputs()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    bits = adapters.bits["default"] | adapters.bits["other"]
    for name, gradient in gradients[1].items():
        if bits[name].all():
            assert_close(gradients[0][name], gradient, name)
        elif bits[name].any():
            assert_close(gradients[0][name].reshape(-1), gradient[bits[name]], name)


def test_merging_and_unloading_both(adapters, request):
    """Guards against a merged model that lacks one of two, or keeps parts of either."""
    kind = request.node.callspec.params["adapters"]
    if kind == "modules_to_save":
        pytest.skip("PEFT merges one head")
    plain = both(kind)
    for adapter in NAMES:
        plain.load_state_dict(adapters.alone[adapter].state_dict(), strict=False)
    merged = [m.merge_and_unload(adapter_names=list(NAMES)) for m in (adapters.both, plain)]
    assert_both_close((output_of(m, inputs()) for m in merged), "merged")
    assert [n for n, _ in merged[0].named_parameters()] == [
        n for n, _ in merged[1].named_parameters()
    ]
    assert get_mask(merged[0]) is None


def test_a_mask_over_another_is_refused():
    """Guards against two masks on one tensor."""
    adapters = Adapters("lora")
    adapters.both.set_adapter("default")
    before = get_mask(adapters.both)
    with pytest.raises(ValueError, match="mask already"):
        apply_mask(adapters.both, adapters.bits["default"])
    assert get_mask(adapters.both) == before
    adapters.assert_as_alone()


def test_an_adapter_without_a_mask_beside_one_that_has_one():
    """Guards against a second, ordinary adapter that is trained in part, or moves the first."""
    masked, plain = copied(both("lora")), both("lora")
    apply_mask(masked, random_bits(plain, 1))
    before = masked.state_dict()
    for model in (masked, plain):
        model.set_adapter("other")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        loss_of(model, inputs()).backward()
        optimizer.step()
    state, expected = masked.state_dict(), plain.state_dict()
    for name, tensor in state.items():
        assert_close(tensor, expected[name] if ".other" in name else before[name], name)


def test_one_mask_for_both():
    """Guards against a mask of two adapters of which only the active one counts."""
    model = both("lora")
    for _, p in model.named_parameters():
        p.requires_grad_("lora" in _)
    bits = random_bits(model, 2)
    apply_mask(model, bits)
    for adapter in NAMES:
        part = {name: b for name, b in bits.items() if f".{adapter}." in name}
        assert get_mask(model, adapter) == FishMask(part)
        model.set_adapter(adapter)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == FishMask(part).num_trainable
    remove_mask(model)
    plain = dense_model("lora")
    assert all(p.shape == model.state_dict()[name].shape for name, p in model.named_parameters())
    assert set(plain.state_dict()) <= set(model.state_dict())
    assert tensor_of(model, next(iter(bits))).is_leaf
