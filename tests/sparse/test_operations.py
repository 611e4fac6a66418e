"""Random sequences of what people do to a model, masked and on a dense twin that masks by hand."""

import pickle
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from fish_tuning import FishMask, apply_mask, get_mask, remove_mask
from tests.sparse.twins import (
    KINDS,
    OWN,
    TIED,
    TWO,
    TWO_IA3,
    Twins,
    assert_both_close,
    assert_close,
    copied,
    inputs,
    loss_of,
    output_of,
    owner_of,
    reload,
    tensor_of,
    tied,
    values_of,
)

# Each operation does the same to both models; `r` decides all that is random in it.


def _random(shape, r):
    return torch.randn(shape, generator=torch.Generator().manual_seed(r.getrandbits(30))).double()


def _backward(twins, r, forward=loss_of):
    """Accumulates gradients; False where nothing is trained, or nothing that this reaches."""
    ids, mode = inputs(r.randrange(9)), r.random() < 0.5
    losses = [forward(model.train(mode), ids) for model in twins.models()]
    assert_both_close(losses, "loss")
    # Tensors without a selected entry are trained in the twin alone, by nothing.
    if not twins.trainable(twins.dense) or not all(loss.requires_grad for loss in losses):
        return False
    for loss in losses:
        loss.backward()
    return True


def train(twins, r):
    """Steps of one optimizer, which later operations go on with."""
    kind = r.choice(["sgd", "adamw", "adamw"])

    def make(parameters):
        if kind == "sgd":
            return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(parameters, 0.02, weight_decay=0.1)

    for _ in range(r.randint(1, 3)):
        if _backward(twins, r):
            twins.step(make)


def train_around_the_root(twins, r):
    """A step of which some gradients come from a forward pass of a submodule."""
    path = {OWN: "lin0"}.get(twins.kind, "base_model.model")

    def around(model, ids):
        inner = model.get_submodule(path)
        return loss_of(inner, ids) if path != "lin0" else inner(model.embedding(ids)).pow(2).mean()

    reached = r.random() < 0.5 and _backward(twins, r)
    reached = _backward(twins, r, around) or reached
    twins.assert_same_gradients()
    if reached:
        twins.step(lambda parameters: torch.optim.SGD(parameters, 0.1))


def write_in_place(twins, r):
    name = r.choice(list(twins.bits))
    how = r.choice(["copy", "mul", "init", "row"])
    new = _random(twins.bits[name].shape, r)
    with torch.no_grad():
        for model in twins.models():
            tensor = tensor_of(model, name)
            if how == "copy":
                tensor.copy_(new)
            elif how == "mul":
                tensor.mul_(0.5)
            elif how == "init":
                nn.init.ones_(tensor)
            else:
                tensor[0] = new[0]


def write_data(twins, r):
    name = r.choice(list(twins.bits))
    new = _random(twins.bits[name].shape, r)
    for model in twins.models():
        tensor_of(model, name).data.copy_(new)


def swap_data(twins, r):
    name = r.choice(twins.names())
    new = _random(twins.bits[name].shape, r)
    for model in twins.models():
        tensor_of(model, name).data = new.clone()


def write_values(twins, r):
    """Writes values one way or another, as averages of weights do."""
    how = r.choice(["copy", "data", "swap"])
    for name in twins.partly() if r.random() < 0.5 else [r.choice(twins.partly())]:
        bits, values = twins.bits[name], values_of(twins.masked, name)
        new = _random(int(bits.sum()), r)
        tensor_of(twins.dense, name).data[bits] = new
        new = new.view_as(values)
        if how == "copy":
            with torch.no_grad():
                values.copy_(new)
        elif how == "data":
            values.data.copy_(new)
        else:
            values.data = new


def scale_parameters(twins, r):
    """As clipping or averaging over `model.parameters()` does."""
    with torch.no_grad():
        for p in twins.masked.parameters():
            if p.requires_grad:
                p.mul_(0.9)
        for name in twins.trainable(twins.dense):
            tensor = tensor_of(twins.dense, name)
            tensor[twins.bits[name]] *= 0.9


def load_state_dict(twins, r):
    ours, noise = twins.dense.state_dict(), r.getrandbits(30)
    masked = [key for key in ours if key in twins.bits]
    for i, key in enumerate(masked):
        ours[key] = ours[key] + 0.1 * _random(ours[key].shape, random.Random(noise + i))
    if pair := [key for key in masked if "lm_head" in key]:
        for key in pair:
            side = "B" if "lora_A" in key else "A"
            ours[key] = next(ours[n] for n in masked if f"lora_embedding_{side}" in n).t().clone()
    if twins.kind == OWN:
        ours["head.weight"] = ours["embedding.weight"]
    assign = r.random() < 0.3 and twins.kind != OWN
    for model in twins.models():
        state = {key: tensor.clone() for key, tensor in ours.items()}
        model.load_state_dict(state, strict=True, assign=assign)
    if assign:
        twins.optimizers = None


def load_adapter_state(twins, r):
    if twins.kind == OWN:
        return
    state = get_peft_model_state_dict(twins.dense)
    state = {key: tensor * 0.9 for key, tensor in state.items()}
    for model in twins.models():
        set_peft_model_state_dict(model, {key: tensor.clone() for key, tensor in state.items()})


def save_and_load(twins, r):
    if twins.kind == OWN:
        return
    active = twins.dense.active_adapter
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, model in (("masked", twins.masked), ("dense", twins.dense)):
            model.save_pretrained(folder / name)
        twins.masked = reload(twins.kind, folder / "masked")
        twins.dense = reload(twins.kind, folder / "dense")
        tied(twins.masked)
        apply_mask(twins.masked, FishMask.from_pretrained(folder / "masked"))
        if twins.kind in (TWO, TWO_IA3):
            twins.masked.set_adapter("other")
            apply_mask(twins.masked, FishMask.from_pretrained(folder / "masked" / "other"))
    for model in twins.models():
        model.set_adapter(active)
    twins.optimizers = None


def merge_and_unmerge(twins, r):
    if twins.kind == OWN:
        return
    for model in twins.models():
        model.merge_adapter()
    twins.assert_same_output(inputs(r.randrange(9)))
    for model in twins.models():
        model.unmerge_adapter()


def switch_adapter(twins, r):
    if twins.kind in (TWO, TWO_IA3):
        name = r.choice(["default", "other"])
        for model in twins.models():
            model.set_adapter(name)


def disable_adapter(twins, r):
    if twins.kind != OWN:
        with twins.masked.disable_adapter(), twins.dense.disable_adapter():
            twins.assert_same_output(inputs(r.randrange(9)))


def copy_models(twins, r):
    """Goes on with copies; the originals must stay as they are."""
    make = copied if r.random() < 0.5 else lambda model: pickle.loads(pickle.dumps(model))
    state = {key: tensor.clone() for key, tensor in twins.dense.state_dict().items()}
    twins.left_behind.append((twins.masked, state))
    twins.masked, twins.dense = make(twins.masked), tied(copied(twins.dense))
    twins.optimizers = None


def cast(twins, r):
    """The whole model, or a part of it, there and back."""
    dtype = r.choice([torch.float32, torch.bfloat16])
    part = r.choice(["", "lin0" if twins.kind == OWN else "base_model.model"])
    if r.random() < 0.3 and twins.kind != TIED:
        part = r.choice(list(twins.bits)).rpartition(".")[0]
    for model in twins.models():
        model.get_submodule(part).to(dtype)
    if r.random() < 0.5:
        for model in twins.models():
            model.state_dict()
    for model in twins.models():
        model.get_submodule(part).to(torch.float64)
    twins.optimizers = None


def freeze_by_name(twins, r):
    part = r.choice(["lora_A", "lora_B", "lin0", "lin1", "ia3", "weight", "other"])
    flag = r.random() < 0.5
    names = {both for name in twins.names() if part in name for both in twins.tied_to(name)}
    for model in twins.models():
        for name, p in model.named_parameters():
            if name in names:
                p.requires_grad_(flag)


def freeze_by_module(twins, r):
    name, flag = r.choice(twins.names()), r.random() < 0.5
    for model in twins.models():
        for both in twins.tied_to(name):
            owner_of(model, both)[0].requires_grad_(flag)
        if twins.kind == OWN:
            model.requires_grad_(flag)


def freeze_adapter(twins, r):
    if twins.kind != OWN:
        for flag in (False, True) if r.random() < 0.5 else (True,):
            for model in twins.models():
                model.set_requires_grad(model.active_adapter, requires_grad=flag)


def remove_and_mask_again(twins, r):
    masks = {name: get_mask(twins.masked, name) for name in ("default", "other")}
    if twins.kind == OWN:
        masks = {None: get_mask(twins.masked)}
    remove_mask(twins.masked)
    for model in twins.models():
        active = getattr(model, "active_adapter", None)
        for adapter in [name for name, mask in masks.items() if mask is not None]:
            if adapter is None:
                model.requires_grad_(True)
            else:
                model.set_adapter(adapter)
            if model is twins.masked:
                apply_mask(model, masks[adapter])
        if active is not None:
            model.set_adapter(active)
    twins.optimizers = None


def reset_adapter(twins, r):
    """PEFT's own way back to the start, with nn.init."""
    seed = r.getrandbits(30)
    for model in twins.models():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, LoraLayer) and twins.kind != TIED:
                module.reset_lora_parameters(model.active_adapter, False)


OPERATIONS = [
    train,
    train,
    train_around_the_root,
    write_in_place,
    write_data,
    swap_data,
    write_values,
    scale_parameters,
    load_state_dict,
    load_adapter_state,
    save_and_load,
    merge_and_unmerge,
    switch_adapter,
    disable_adapter,
    copy_models,
    cast,
    freeze_by_name,
    freeze_by_module,
    freeze_adapter,
    remove_and_mask_again,
    reset_adapter,
]
WRITES_VALUES = {write_values, scale_parameters}
WRITES_TENSORS = {write_in_place, write_data, swap_data, reset_adapter}


# How the models are read


def _state(twins, r):
    twins.assert_same_state()


def _output(twins, r):
    twins.assert_same_output(inputs(r.randrange(9)))


def _output_with_gradients(twins, r):
    ids = inputs(r.randrange(9))
    assert_both_close((output_of(model.eval(), ids) for model in twins.models()), "output")


def _copy(twins, r):
    """Of a copy what the model computes once the adapter is merged, or the mask removed."""
    ids, make = inputs(r.randrange(9)), copied
    if r.random() < 0.5:
        make = lambda model: pickle.loads(pickle.dumps(model))  # noqa: E731
    masked, dense = make(twins.masked), tied(copied(twins.dense))
    if twins.kind == OWN or r.random() < 0.3:
        remove_mask(masked)
    else:
        masked, dense = masked.merge_and_unload(), dense.merge_and_unload()
    assert {n for n, _ in masked.named_parameters()} == {n for n, _ in dense.named_parameters()}
    with torch.no_grad():
        assert_both_close((output_of(model.eval(), ids) for model in (masked, dense)), "copy")


READS = [_state, _output, _output_with_gradients, _copy]


def run(kind, operations):
    """Both models are equal after every operation, by whichever way they are read first."""
    twins = Twins.build(kind, seed=len(operations))
    unread = None
    for operation, seed in operations:
        r = random.Random(seed)
        written = operation in WRITES_VALUES | WRITES_TENSORS
        side = "values" if operation in WRITES_VALUES else "tensors"
        if written and unread not in (None, side):
            # To write on both sides in between is an error.
            _state(twins, r)
        operation(twins, r)
        tied(twins.dense)
        unread = side if written else unread
        # Some writes are read by the next operation first.
        if not written or r.random() < 0.7:
            read = r.choice(READS)
            read(twins, r)
            unread = unread if read is _copy else None
        assert twins.trainable(twins.masked) == twins.trainable(twins.dense)
    for read in READS:
        read(twins, random.Random(0))
    for model, state in twins.left_behind:
        for name, tensor in model.state_dict().items():
            assert_close(tensor, state[name], name)


sequences = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**16)), min_size=1, max_size=7
)
QUICK, SLOW = 3, 200
GENTLE = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=QUICK, derandomize=True, **GENTLE)
@given(operations=sequences)
def test_some_sequences(kind, operations):
    """Guards against writes undone, stale reads and lost gradients, whatever came before."""
    run(kind, operations)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=SLOW, **GENTLE)
@given(operations=sequences)
def test_many_sequences(kind, operations):
    """The same, over thousands of sequences: new ones in each run."""
    run(kind, operations)


@pytest.mark.slow
@pytest.mark.parametrize("operation", dict.fromkeys(OPERATIONS), ids=lambda o: o.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_each_operation(kind, operation):
    """Guards each operation by itself, after a step of training and before another."""
    for seed in range(3):
        run(kind, [(train, seed), (operation, seed), (train, seed + 1)])


def test_a_cast_of_one_tensor_leaves_the_others():
    """Guards unselected tensors of other modules, which were cast along with a part's values."""
    twins = Twins.build("lora", seed=1)
    (unselected,) = [name for name, bits in twins.bits.items() if not bits.any()]
    for model in twins.models():
        model.get_submodule("base_model.model.lin1.lora_A.default").to(torch.float32)
        model.state_dict()
    assert owner_of(twins.masked, unselected)[0].weight.dtype == torch.float64
    twins.assert_same_state()


@pytest.mark.parametrize(
    ("kind", "operations"),
    [
        # A part of the model was called by itself after a write, and the step was refused.
        (OWN, [(train, 0)] * 4 + [(write_in_place, 1), (train_around_the_root, 0)]),
        # Freezing an adapter brought back an unselected tensor as it was before a cast.
        ("embedding", [(train, 0)] * 3 + [(cast, 65533), (freeze_adapter, 1)]),
        # A pair of tied tensors was loaded one after the other.
        (TIED, [(load_state_dict, 20668)]),
    ],
)
def test_sequences_that_failed(kind, operations):
    run(kind, operations)
