"""Adapters whose B is zero and untrained: left out, and nothing else changes."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from fish_tuning import apply_mask, remove_mask
from fish_tuning.sparse.apply import masked_parameters
from tests.models import examples_for, pad, tiny_bert, with_lora

TARGETS = ["query", "key", "value"]
IDLE = "query"
"""The module with nothing trained; of value's A alone some entries are."""


def lora_bert(**config):
    """LoRA at its usual start, B = 0, without dropout."""
    settings = {"target_modules": TARGETS, "lora_dropout": 0.0, **config}
    base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return with_lora(base, **settings).eval()


def mask_for(model, idle=IDLE):
    """Random bits; none in the idle module, nor in value's B."""
    generator = torch.Generator().manual_seed(0)
    mask = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            mask[name] = torch.rand(p.shape, generator=generator) < 0.5
            if "modules_to_save" in name:
                mask[name][:] = True
            if f".{idle}." in name or ".value.lora_B." in name:
                mask[name][:] = False
    return mask


def called(model, batch):
    """The modules whose adapter computes something in a forward pass."""
    seen = set()
    handles = [
        module.register_forward_hook(
            partial(lambda target, *_: seen.add(target), name.split(".")[-3])
        )
        for name, module in model.named_modules()
        if name.endswith("lora_A.default")
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def steps(model, mask=None, count=4):
    """Losses of AdamW steps; with a mask, of dense training that masks gradients."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), 0.02, weight_decay=0)
    losses = []
    for i in range(count):
        optimizer.zero_grad()
        loss = model(**pad(examples_for(model, 4, i))).loss
        loss.backward()
        for name, p in parameters.items():
            if mask and p.grad is not None:
                p.grad *= mask[name]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_training_equals_dense_lora_with_masked_gradients(checkpointing):
    """Guards a layer that was left out and did contribute, also where layers run twice."""
    model = lora_bert()
    twin, mask = copy.deepcopy(model), mask_for(model)
    apply_mask(model, mask)
    assert called(model, pad(examples_for(model, 2))) == {"key", "value"}
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
    assert steps(model) == pytest.approx(steps(twin, mask), abs=1e-6)
    state, expected = model.state_dict(), twin.state_dict()
    for name in mask:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-5, atol=1e-6)
        assert state[name].shape == expected[name].shape


def test_layers_have_their_adapter_outside_of_a_forward_pass():
    """Guards a failed forward pass, and merging, against an adapter that stays off."""
    model = lora_bert()
    apply_mask(model, mask_for(model))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 1, 5))
    assert layer.active_adapters == ["default"]
    steps(model, count=1)
    batch = pad(examples_for(model, 2))
    with torch.no_grad():
        expected = model(**batch).logits
        merged = remove_mask(model).merge_and_unload()(**batch).logits
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_b_is_used(assign):
    """Guards layers that are left out although a loaded state gave them weights."""
    model = lora_bert()
    mask = mask_for(model)
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in loaded.named_parameters():
            if ".lora_B." in name:
                p.normal_()
    apply_mask(model, mask)
    model.load_state_dict(loaded.state_dict(), assign=assign)
    batch = pad(examples_for(model, 2))
    assert called(model, batch) == {*TARGETS}
    torch.testing.assert_close(model(**batch).logits, loaded(**batch).logits)


def test_a_zero_b_that_is_trained_is_used():
    """Guards the start of training, when all of B is zero and its entries have to learn."""
    model = lora_bert()
    apply_mask(model, mask_for(model, idle=None))
    assert called(model, pad(examples_for(model, 2))) == {*TARGETS}


def test_a_trained_a_keeps_its_gradient():
    """Guards engines that wait for the gradient of every parameter: it is zero, and it is there."""
    model = lora_bert()
    mask = {n: bits if ".lora_A." in n else bits & False for n, bits in mask_for(model).items()}
    apply_mask(model, mask)
    model(**pad(examples_for(model, 2))).loss.backward()
    assert masked_parameters(model)
    for values in masked_parameters(model):
        assert values.grad is not None and not values.grad.any()


def test_an_untrained_b_that_is_not_zero_is_used():
    """Guards an adapter that was trained before and contributes though nothing of it is now."""
    model = lora_bert(init_lora_weights=False)
    twin = copy.deepcopy(model)
    apply_mask(model, mask_for(model))
    batch = pad(examples_for(model, 2))
    assert called(model, batch) == {*TARGETS}
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits)


def test_variants_are_used():
    """Guards DoRA, whose magnitude acts through a B that is zero."""
    model = lora_bert(use_dora=True)
    mask = mask_for(model)
    for name in mask:
        if "magnitude" in name:
            mask[name][:] = True
    twin = copy.deepcopy(model)
    apply_mask(model, mask)
    assert steps(model) == pytest.approx(steps(twin, mask), abs=1e-6)


def test_a_bias_of_b_is_used():
    """Guards the bias of B, which contributes where its weight does not."""
    model = lora_bert(lora_bias=True)
    mask = mask_for(model)
    for name in mask:
        if name.endswith("lora_B.default.bias"):
            mask[name][:] = True
    twin = copy.deepcopy(model)
    apply_mask(model, mask)
    assert steps(model) == pytest.approx(steps(twin, mask), abs=1e-6)


def test_only_the_masked_adapter_is_left_out():
    """Guards a second adapter in the same layers."""
    model = lora_bert()
    mask = mask_for(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False))
    apply_mask(model, mask)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    batch = pad(examples_for(model, 2))
    outputs = {}
    for active in (["default"], ["other"], ["default", "other"]):
        for layer in layers:
            layer.set_adapter(active)
        outputs[len(active), active[0]] = model(**batch).logits
    # B of the masked adapter is still 0.
    torch.testing.assert_close(outputs[2, "default"], outputs[1, "other"])
    assert not torch.allclose(outputs[2, "default"], outputs[1, "default"])


@pytest.mark.parametrize("way", ["copy", "removed"])
def test_copies_and_removal(way):
    """Guards hooks that refer to the model they were copied from, or outlive the mask."""
    model = lora_bert()
    apply_mask(model, mask_for(model))
    batch = pad(examples_for(model, 2))
    if way == "copy":
        twin = copy.deepcopy(model)
        steps(twin)
        assert called(twin, batch) == {"key", "value"}
        assert not torch.allclose(model(**batch).logits, twin(**batch).logits)
    else:
        assert called(remove_mask(model), batch) == {*TARGETS}


def test_compiled_model_has_no_graph_more():
    """Guards against graph breaks and recompilations by the layers' hooks."""
    counters = torch._dynamo.utils.counters
    graphs = []
    for masked in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = lora_bert()
        if masked:
            apply_mask(model, mask_for(model))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
        for i in range(3):
            compiled(**pad(examples_for(model, 4, i, shortest=5, longest=5))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] == graphs[1]


def test_dropout_draws_the_same_numbers():
    """Guards against losses that differ from those of the dense model with the same seed."""
    model = lora_bert(lora_dropout=0.5)
    dense = copy.deepcopy(model)
    mask = mask_for(model)
    apply_mask(model, mask)
    batch = pad(examples_for(model, 4))
    logits = []
    for each in (model, dense):
        torch.manual_seed(3)
        logits.append(each.train()(**batch).logits)
    assert torch.equal(*logits)
    assert IDLE in called(model, batch)
    assert IDLE not in called(model.eval(), batch)
