"""The library on an accelerator, compared with a processor, plain PEFT and dense optimizers.

FISH_TUNING_TEST_DEVICE names another device than the first CUDA device: "cpu", to debug the tests.
"""

import copy
import functools
import os
import shutil

import pytest
import torch
from torch import nn

from fish_tuning import (
    FishMask,
    apply_mask,
    calculate_fisher_information,
    create_mask_from_fisher,
    score_with_perturbed_b,
)
from tests.models import (
    assert_scores_close,
    base_of,
    batches_of,
    examples_for,
    naive_scores,
    tiny_bert,
    tiny_llama,
)
from tests.parallel import labelled_alike, lora_bert, lora_llama, scored
from tests.rounding import float32_rtol
from tests.sparse.twins import KINDS, TIED, Twins, inputs, loss_of
from tests.test_families import adapted
from tests.training import random_mask, tensors_of, trainable

DEVICE = os.environ.get("FISH_TUNING_TEST_DEVICE") or (
    "cuda" if torch.cuda.is_available() else None
)
ON_CPU = DEVICE == "cpu"
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0)
# Heads of 16, which attention's faster kernels take.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}

pytestmark = pytest.mark.skipif(DEVICE is None, reason="there is no accelerator")
needs_accelerator = pytest.mark.skipif(ON_CPU, reason="not for a processor")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler"
)


# Models, batches and steps


def wide_bert():
    return adapted(functools.partial(tiny_bert, **WIDE), torch.float32)


def wide_llama():
    return adapted(functools.partial(tiny_llama, **WIDE), torch.float32)


def own_weights():
    return tiny_bert(**NO_DROPOUT)


BUILDS = [lora_bert, lora_llama, wide_bert, wide_llama, own_weights]
each_build = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
each_lora = pytest.mark.parametrize("build", BUILDS[:4], ids=lambda build: build.__name__)


def on_device(batch, device=DEVICE):
    return {key: value.to(device) for key, value in batch.items()}


def on_processor(tensors):
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def adamw(parameters, **options):
    # Epsilon is large enough that a gradient that is 0 but for rounding moves nothing.
    return torch.optim.AdamW(parameters, 0.02, eps=1e-4, weight_decay=0.1, **options)


def step(model, optimizer, number, bits=None, device=DEVICE, dtype=None, scaler=None, run=None):
    """One step, on a dense model with masked gradients where there are `bits`; returns the loss."""
    optimizer.zero_grad()
    batch = on_device(labelled_alike(model, number), device)
    with torch.autocast(device, dtype, enabled=dtype is not None):
        loss = (model if run is None else run)(**batch).loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None and bits is not None:
        scaler.unscale_(optimizer)
    named = trainable(model) if bits is not None else {}
    before = {name: p.detach().clone() for name, p in named.items()}
    for name, p in named.items():
        if p.grad is not None:
            p.grad *= bits[name].to(device)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    for name, p in named.items():  # Weight decay has moved frozen entries.
        p.data.copy_(torch.where(bits[name].to(device), p, before[name]))
    return float(loss.detach())


def train(model, make=adamw, steps=range(3), **options):
    """Trains with a new optimizer; returns the losses."""
    optimizer = make(trainable(model).values())
    return [step(model, optimizer, number, **options) for number in steps]


def masked_and_dense(build, density=0.4):
    """A masked model, the dense one and the mask, on the device."""
    dense = build().to(DEVICE)
    mask = random_mask(dense, density)
    return apply_mask(copy.deepcopy(dense), mask), dense, mask


def assert_same(model, other, mask, **tolerance):
    """Equal tensors on whatever devices, also those that no mask names."""
    ours, theirs = on_processor(model.state_dict()), on_processor(other.state_dict())
    assert ours.keys() == theirs.keys() >= set(mask)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, **tolerance, msg=lambda m, n=name: f"{n}{m}")


def assert_frozen(model, mask, before):
    """Unselected entries have their bits, and most of the others are new."""
    after, changed = on_processor(model.state_dict()), 0
    before = on_processor(before)
    for name, bits in on_processor(mask).items():
        assert torch.equal(after[name][~bits], before[name][~bits]), name
        changed += int((after[name] != before[name])[bits].sum())
    assert changed > 0.5 * FishMask(mask).num_trainable


# Scoring and masks


@each_build
@pytest.mark.parametrize("size", [1, 3, 7])
def test_scores_equal_a_loop_in_float64(build, size, caplog):
    """Guards the rules for single examples on the device's kernels, padding and all."""
    model, examples = build(), examples_for(build(), 7)
    loop = functools.partial(naive_scores, model, examples)
    rtol = max(1e-5, float32_rtol(model, loop, loop()))
    expected = naive_scores(copy.deepcopy(model).double(), examples)
    found = scored(model.to(DEVICE), batches_of(examples, size))
    assert all(score.dtype == torch.float32 for score in found.values())
    found = {name: score.double().cpu() for name, score in found.items()}
    assert_scores_close(found, expected, rtol)
    assert "one example at a time" not in caplog.text


@each_build
def test_scoring_again_gives_the_same_bits(build):
    """Guards sums whose order is left to chance."""
    model = build().to(DEVICE)
    batches = batches_of(examples_for(model, 7), 3)
    first, second = scored(model, batches), scored(model, batches)
    assert [n for n in first if not torch.equal(first[n], second[n])] == []
    assert create_mask_from_fisher(first, 0.1) == create_mask_from_fisher(second, 0.1)


@each_lora
@pytest.mark.parametrize("options", [{"estimator": "true"}, {}], ids=["true", "perturbed"])
def test_draws_are_those_of_a_processor(build, options):
    """Guards labels and directions against random numbers that only one kind of device draws."""
    model = build()
    score = calculate_fisher_information if options else score_with_perturbed_b
    batches = batches_of(examples_for(model, 7), 3)
    expected = score(model, batches, progress=False, **options)
    found = score(model.to(DEVICE), batches, progress=False, **options)
    assert_scores_close(on_processor(found), expected, 2e-4)


@each_build
@pytest.mark.parametrize("scope", ["global", "adaptive"])
def test_mask_is_exact_and_that_of_a_processor(build, scope):
    """Guards the selection among scores on the device: k entries, the same ones."""
    model = build().to(DEVICE)
    scores = scored(model, batches_of(examples_for(model, 7), 3))
    mask = create_mask_from_fisher(scores, num_trainable=123, scope=scope)
    assert mask == create_mask_from_fisher(on_processor(scores), num_trainable=123, scope=scope)
    apply_mask(model, mask)
    assert sum(p.numel() for p in trainable(model).values()) == 123
    assert {p.device.type for p in trainable(model).values()} == {torch.device(DEVICE).type}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_lora
def test_scores_in_half_precision(build, dtype):
    """Guards overflow and types: the scores are those of float64, roughly."""
    model = build()
    examples = examples_for(model, 7)
    expected = naive_scores(copy.deepcopy(model).double(), examples)
    base_of(model).to(dtype)
    found = scored(model.to(DEVICE), batches_of(examples, 3))
    ours = torch.cat([score.double().cpu().flatten() for score in found.values()])
    theirs = torch.cat([score.flatten() for score in expected.values()])
    assert nn.functional.cosine_similarity(ours, theirs, 0) > 0.98


# Training


@each_build
def test_masking_before_and_after_the_move(build):
    """Guards a masked model that is moved, and values that differ from the processor's."""
    model = build()
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    alone = apply_mask(copy.deepcopy(model), mask)
    first = apply_mask(copy.deepcopy(model), mask).to(DEVICE)
    after = apply_mask(model.to(DEVICE), mask)
    train(alone, device="cpu")
    train(first)
    train(after)
    assert_frozen(after, mask, before)
    assert_same(first, after, mask, rtol=1e-6, atol=1e-6)
    # AdamW takes a full step for a small gradient, too, whose rounding errors are large.
    assert_same(after, alone, mask, rtol=1e-4, atol=1e-4)


OPTIMIZERS = {
    "adamw": adamw,
    "fused": functools.partial(adamw, fused=True),
    "foreach": functools.partial(adamw, foreach=True),
    "capturable": functools.partial(adamw, capturable=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1),
}
if ON_CPU:
    del OPTIMIZERS["capturable"]
each_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


@each_optimizer
@each_lora
def test_trains_as_a_dense_optimizer(build, kind):
    """Guards against steps that the values do not take, or frozen entries do."""
    model, dense, mask = masked_and_dense(build)
    before = tensors_of(dense, mask)
    train(model, OPTIMIZERS[kind], range(4))
    train(dense, OPTIMIZERS[kind], range(4), bits=mask)
    assert_frozen(model, mask, before)
    assert_same(model, dense, mask, rtol=1e-5, atol=2e-6)


@each_optimizer
def test_optimizer_state_is_saved_and_loaded(kind, tmp_path):
    """Guards moments that are on another device, or of other entries, after loading."""
    model, _, mask = masked_and_dense(lora_bert)
    whole = copy.deepcopy(model)
    train(whole, OPTIMIZERS[kind], range(6))
    optimizer = OPTIMIZERS[kind](trainable(model).values())
    for number in range(3):
        step(model, optimizer, number)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state")
    weights, moments = torch.load(tmp_path / "state", map_location="cpu")
    again = apply_mask(lora_bert().to(DEVICE), mask)
    again.load_state_dict(weights)
    optimizer = OPTIMIZERS[kind](trainable(again).values())
    optimizer.load_state_dict(moments)
    for number in range(3, 6):
        step(again, optimizer, number)
    assert_same(again, whole, mask, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != TIED])
def test_methods_train_as_dense_ones(kind):
    """Guards other methods than LoRA, several adapters and tied weights, in float64."""
    twins = Twins.build(kind)
    for model in twins.models():
        model.to(DEVICE)
    twins.bits = on_device(twins.bits)
    for seed in range(3):
        for model in twins.models():
            loss_of(model.eval(), inputs(seed).to(DEVICE)).backward()
        twins.assert_same_gradients()
        twins.step(lambda parameters: torch.optim.AdamW(parameters, 0.05, weight_decay=0.1))
    twins.assert_same_state()


@pytest.mark.parametrize("all_of_it", [False, True], ids=["base", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_lora
def test_models_in_half_precision(build, dtype, all_of_it):
    """Guards values in another type than their tensors."""

    def halved():
        model = build().to(dtype)
        return model if all_of_it else adapter_in_float32(model)

    model, dense, mask = masked_and_dense(halved)
    before = tensors_of(dense, mask)
    train(model)
    train(dense, bits=mask)
    assert_frozen(model, mask, before)
    assert_same(model, dense, mask)


def adapter_in_float32(model):
    """As PEFT keeps it on a base in half precision; the head is cast with the base."""
    for name, p in trainable(model).items():
        if "lora_" in name:
            p.data = p.data.float()
    return model


@each_lora
def test_autocast_in_bfloat16(build):
    """Guards weights that autocast has cast and keeps, while the values go on."""
    model, dense, mask = masked_and_dense(build)
    before = tensors_of(dense, mask)
    losses = train(model, dtype=torch.bfloat16)
    assert losses == pytest.approx(train(dense, dtype=torch.bfloat16, bits=mask), rel=1e-4)
    assert_frozen(model, mask, before)
    assert_same(model, dense, mask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_in_float16(fused):
    """Guards gradients against a factor that is left in them: training is the dense one's."""
    model, dense, mask = masked_and_dense(lora_bert)
    for each, bits in ((model, None), (dense, mask)):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
        settings = {"dtype": torch.float16, "scaler": scaler, "bits": bits}
        train(each, functools.partial(adamw, fused=fused), **settings)
        assert scaler.get_scale() == 2.0**10
    assert_same(model, dense, mask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_is_left_out(fused):
    """Guards values against infinite gradients, and the steps after the one left out."""
    model, dense, mask = masked_and_dense(lora_bert)
    before = on_processor(model.state_dict())
    for each in (model, dense):
        optimizer = adamw(trainable(each).values(), fused=fused)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**120)
        settings = {"dtype": torch.float16, "scaler": scaler}
        settings["bits"] = mask if each is dense else None
        step(each, optimizer, 0, **settings)
        assert scaler.get_scale() == 2.0**119
        if each is model:
            state = on_processor(model.state_dict())
            assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
        scaler.update(2.0**10)
        step(each, optimizer, 1, **settings)
    assert_same(model, dense, mask, rtol=1e-4, atol=1e-4)
    assert_frozen(model, mask, before)


@each_lora
def test_moves_in_the_middle_of_training(build):
    """Guards values and tensors that part when the model is moved and the optimizer's state is."""
    model, dense, mask = masked_and_dense(build)
    for each, bits in ((model, None), (dense, mask)):
        optimizer = adamw(trainable(each).values())
        for number, device in enumerate([DEVICE, "cpu", "cpu", DEVICE]):
            each.to(device)
            optimizer.load_state_dict(optimizer.state_dict())  # Moves it to the parameters.
            step(each, optimizer, number, bits=bits, device=device)
    assert_same(model, dense, mask, rtol=1e-5, atol=2e-6)


@each_lora
def test_gradient_checkpointing(build):
    """Guards layers that run twice, in scoring and in training."""
    model = build().to(DEVICE).train()
    checkpointed = copy.deepcopy(model)
    base_of(checkpointed).gradient_checkpointing_enable({"use_reentrant": False})
    batches = batches_of(examples_for(model, 7), 3)
    plain = scored(model, batches)
    assert_scores_close(scored(checkpointed, batches), plain, 1e-5)
    mask = create_mask_from_fisher(plain, 0.3)
    for each in (model, checkpointed):
        train(apply_mask(each, mask))
    assert_same(checkpointed, model, mask, rtol=1e-5, atol=2e-6)


@needs_compiler
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("build", [lora_bert, wide_llama], ids=lambda build: build.__name__)
def test_compiled_training(build, mode):
    """Guards graphs that hold the values of an earlier step."""
    model, _, mask = masked_and_dense(build)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    repeated = [0, 1, 2, 0, 1, 2]  # A graph is captured at its second or third run.
    losses = train(model, steps=repeated, run=torch.compile(model, mode=mode, dynamic=False))
    torch._dynamo.reset()
    expected = train(eager, steps=repeated)
    assert losses == pytest.approx(expected, rel=1e-4) and sum(losses[3:]) < sum(losses[:3])
    assert_same(model, eager, mask, rtol=1e-3, atol=1e-4)
