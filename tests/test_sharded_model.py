"""Scoring models that `fully_shard` (FSDP2) has divided among gloo processes on one machine."""

import time
from functools import partial
from typing import get_args

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from fish_tuning import (
    FishScores,
    apply_mask,
    create_mask_from_fisher,
    score_with_perturbed_b,
)
from fish_tuning.config import Scope
from fish_tuning.parts import Part, whole
from fish_tuning.per_example import accumulate, gradients
from tests.models import (
    base_of,
    batches_of,
    examples_for,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    with_lora,
)
from tests.parallel import (
    Failing,
    assert_equal_scores,
    assert_identical,
    assert_same_weights,
    error_of,
    labelled_alike,
    lora_bert,
    lora_llama,
    optimizer_for,
    scored,
    tensors_of,
    train,
)
from tests.processes import in_processes


def all_trained(model):
    return model.requires_grad_(True)


def odd_llama():
    """Dimensions that two and four processes cannot divide evenly."""
    return all_trained(tiny_llama(intermediate_size=21, vocab_size=41, num_hidden_layers=1))


def undropped_bert():
    return all_trained(tiny_bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0))


def dora():
    return with_lora(tiny_llama(), init_lora_weights=False, lora_dropout=0.0, use_dora=True)


def checkpointed():
    model = lora_llama()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model


def with_own_loss():
    """A loss that is known for one example at a time only."""
    model = lora_bert()

    def double(module, args, outputs):
        if outputs.loss is not None:
            outputs.loss = 2 * outputs.loss

    base_of(model).register_forward_hook(double)
    return model


def layers_of(model):
    base = base_of(model)
    if hasattr(base, "bert"):
        return base.bert.encoder.layer
    return base.transformer.h if hasattr(base, "transformer") else base.model.layers


def sharded(model, **settings):
    for layer in layers_of(model):
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def sharded_in_groups(model, **settings):
    """As accelerate does it: the last norm and the head together."""
    base = base_of(model)
    for layer in base.model.layers:
        fully_shard(layer, **settings)
    fully_shard(base.model.embed_tokens, **settings)
    fully_shard([base.model.norm, base.lm_head], **settings, reshard_after_forward=False)
    return fully_shard(model, **settings)


def with_wrapped_layers(model):
    layers = layers_of(model)
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer)
    return sharded(model)


def prepared_by_accelerate(model):
    """By the plugin of accelerate, which chooses it on accelerators only."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        activation_checkpointing=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.fsdp_plugin.set_auto_wrap_policy(model)
    return fsdp2_prepare_model(accelerator, fsdp2_apply_ac(accelerator, model))


def layers_only(model):
    for layer in layers_of(model):
        fully_shard(layer)
    return model


CASES = {
    "LoRA": (lora_llama, sharded, {}),
    "all weights, odd sizes": (odd_llama, sharded_in_groups, {}),
    "all weights, not divided again": (
        undropped_bert,
        partial(sharded, reshard_after_forward=False),
        {"statistic": "absolute"},
    ),
    "root only": (lora_bert, fully_shard, {"estimator": "true", "label_samples": 2}),
    "layers only": (lora_llama, layers_only, {"num_samples": 4}),
    "Conv1D, tied head": (lambda: all_trained(tiny_gpt2()).eval(), sharded, {}),
    "recomputed": (dora, sharded, {}),
    "one by one": (with_own_loss, sharded, {}),
    "checkpointing": (checkpointed, sharded, {}),
    "checkpoint wrappers": (lora_llama, with_wrapped_layers, {}),
    "accelerate": (lora_llama, prepared_by_accelerate, {}),
    "CPU offload": (
        lora_bert,
        partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        {},
    ),
}


def built(case):
    """The model of a case, in float64, its batches and the options for scoring."""
    model = CASES[case][0]().double()
    return model, batches_of(examples_for(model, 7), 3), CASES[case][2]


def score_cases(rank, cases):
    found = {}
    for case in cases:
        model, batches, options = built(case)
        scores = scored(CASES[case][1](model), batches, **options)
        held = sum(Part(score).local.numel() for score in scores.values())
        found[case] = complete(scores), held
    return found


def complete(scores):
    return {name: whole(score) for name, score in scores.items()}


def assert_cases_are_right(count, folder, cases):
    results = in_processes(count, folder, score_cases, cases)
    for case in cases:
        model, batches, options = built(case)
        expected = scored(model, batches, **options)
        by_rank = [result[case][0] for result in results]
        assert_identical(by_rank)
        for name, score in expected.items():
            # Not below rounding errors: the gradient of a key's bias is 0 in theory.
            close = {"rtol": 1e-12, "atol": 1e-14 * float(score.max())}
            torch.testing.assert_close(by_rank[0][name], score, **close, msg=f"{case}: {name}")
        # Nothing is held twice.
        if case != "layers only":
            held = [result[case][1] for result in results]
            assert sum(held) == sum(score.numel() for score in expected.values())
            assert max(held) < 1.5 * min(held) or count == 4


def test_scores_are_those_of_one_process(tmp_path):
    """Guards against rows that are scored by the wrong process, or not by all examples."""
    assert_cases_are_right(2, tmp_path / "a", list(CASES))


@pytest.mark.slow
def test_scores_in_four_processes(tmp_path):
    """Guards tensors with fewer rows than there are processes."""
    assert_cases_are_right(4, tmp_path / "a", list(CASES))


def in_other_ways(rank, folder, batches):
    """Scores of a perturbed B, in float32 and half precision, of a file, and of a 2-d mesh."""
    found = {}
    perturbed = score_with_perturbed_b(sharded(with_lora(tiny_llama())), batches, progress=False)
    found["perturbed"] = complete(perturbed)
    perturbed.save_pretrained(folder)
    torch.distributed.barrier()
    found["saved"] = dict(FishScores.from_pretrained(folder))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    half = scored(sharded(odd_llama(), mp_policy=policy), batches)
    found["half"] = complete(half)
    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "parts"))
    repeated = scored(sharded(lora_llama(), mesh=mesh), batches, device="cpu")
    found["repeated"] = complete(repeated)
    return found


def assert_other_ways_are_right(count, folder):
    batches = batches_of(examples_for(tiny_llama(), 7), 3)
    results = in_processes(count, folder / "a", in_other_ways, folder / "scores", batches)
    for kind, found in results[0].items():
        assert_identical([result[kind] for result in results])
        if kind == "half":
            expected = scored(odd_llama().bfloat16(), batches)
            for name, score in expected.items():
                assert found[name].dtype == torch.float32
                assert (found[name] - score).norm() < 0.1 * score.norm(), name
        elif kind == "repeated":
            assert_equal_scores(found, scored(lora_llama(), batches))
        else:
            model = with_lora(tiny_llama())
            assert_equal_scores(found, score_with_perturbed_b(model, batches, progress=False))


def test_other_ways_to_score(tmp_path):
    """Guards against a B that is drawn for each part, and files of a part of the scores."""
    assert_other_ways_are_right(2, tmp_path)


@pytest.mark.slow
def test_other_ways_in_four_processes(tmp_path):
    """Guards rows that are held twice, on a mesh of two dimensions."""
    assert_other_ways_are_right(4, tmp_path)


# From scores to a trained model


def scored_masked_and_trained(rank, batches):
    scores = scored(sharded(lora_llama().double()), batches)
    masks = {scope: masked_by(scores, scope) for scope in get_args(Scope)}
    model = lora_llama()
    apply_mask(model, masks["adaptive"])
    train(sharded(model), rank, 2)
    return masks, tensors_of(model, masks["adaptive"])


def masked_by(scores, scope):
    return create_mask_from_fisher(scores, 0.2, scope=scope)


def test_masks_and_training_are_those_of_one_process(tmp_path):
    """Guards the way of the documentation: score, mask a model built again, and shard it."""
    batches = batches_of(examples_for(lora_llama(), 7), 3)
    scores = scored(lora_llama().double(), batches)
    model = lora_llama()
    mask = masked_by(scores, "adaptive")
    apply_mask(model, mask)
    before = tensors_of(model, mask)
    train(model)
    results = in_processes(2, tmp_path / "a", scored_masked_and_trained, batches)
    for masks, _ in results:
        for scope, found in masks.items():
            assert found == masked_by(scores, scope), scope
    assert_same_weights([tensors for _, tensors in results], tensors_of(model, mask), before)


# What scoring leaves behind


def trained(rank, between, settings):
    """Parameters and gradients after steps of training, with something else between them."""
    model = sharded(undropped_bert(), **settings)
    optimizer = optimizer_for(model)
    for step in range(3):
        batch = labelled_alike(model, step)
        part = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
        between(model)
        model(**part).loss.backward()
        between(model)
        optimizer.step()
        if step < 2:
            optimizer.zero_grad()
    parameters = {name: p.detach().to_local() for name, p in model.named_parameters()}
    return parameters, {name: p.grad.to_local() for name, p in model.named_parameters()}


def score(model):
    scored(model, batches_of(examples_for(model, 3), 2))


def fail_and_score(model):
    """Interrupts a forward pass, and a backward pass, of scoring."""
    layer = layers_of(model)[1]
    batches = batches_of(examples_for(model, 3), 2)
    interrupted = RuntimeError("interrupted")

    def in_forward(module, args, output):
        raise interrupted

    def in_backward(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(lambda gradient: in_forward(module, args, output))

    for hook in (in_forward, in_backward):
        handle = layer.register_forward_hook(hook)
        assert error_of(scored, model, batches) == ("RuntimeError", "interrupted")
        handle.remove()
    score(model)


def train_and_score(rank):
    found = []
    for settings in ({}, {"reshard_after_forward": False}):
        expected = trained(rank, lambda model: None, settings)
        found += [(expected, trained(rank, each, settings)) for each in (score, fail_and_score)]
    return found


def test_training_goes_on_as_without_scoring(tmp_path):
    """Guards against gradients that scoring leaves or exchanges, and interrupted passes."""
    for results in in_processes(2, tmp_path / "a", train_and_score):
        for expected, found in results:
            for without, with_scoring in zip(expected, found, strict=True):
                assert_identical([without, with_scoring])


# Failures


def out_of_memory_at(number):
    """Has the n-th step of adding gradients fail."""
    genuine = accumulate.accumulate
    calls = iter(range(10**6))

    def fails(*args, **options):
        if next(calls) == number:
            raise torch.OutOfMemoryError("out of memory on purpose")
        return genuine(*args, **options)

    gradients.accumulate = fails
    return lambda: setattr(gradients, "accumulate", genuine)


def failures(rank, batches):
    found = []
    for number in (3, 60):  # In the first batch, which is compared with autograd, and later.
        model = sharded(lora_llama().double())
        restore = out_of_memory_at(number if rank else -1)
        scores = scored(model, batches)
        found.append(complete(scores))
        restore()
    start = time.monotonic()
    model = sharded(lora_llama())
    unlabelled = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in batches]
    errors = [
        error_of(scored, model, Failing(batches, fails=rank == 1)),
        error_of(scored, model, batches[rank:]),
        error_of(scored, model, batches[: 2 + rank]),
        error_of(scored, model, unlabelled),
    ]
    model.set_requires_gradient_sync(False)
    model(**batches[0]).loss.backward()
    errors.append(error_of(scored, model, batches))
    assert not any(p.grad is not None for p in model.parameters())
    return found, errors, time.monotonic() - start


def test_failures_reach_all_processes(tmp_path):
    """Guards against processes that wait in an exchange of the model for one that has raised, and
    batches that only one of them divides."""
    model = lora_llama()
    batches = batches_of(examples_for(model, 9), 3)
    expected = scored(lora_llama().double(), batches)
    results = in_processes(2, tmp_path / "a", failures, batches)
    for scores, errors, seconds in results:
        for found in scores:
            assert_equal_scores(found, expected)
        for kind, message in errors[1:3]:
            assert kind == "ValueError" and "given different calibration batches" in message
        assert errors[3] == ("ValueError", "all labels of the 9 calibration examples are -100")
        assert "gradients that have not been exchanged yet" in errors[4][1]
        assert seconds < 60
    (_, first, _), (_, second, _) = results
    assert first[0] == ("RuntimeError", "scoring failed in process 1: OSError: disk on fire")
    assert second[0] == ("OSError", "disk on fire")


def failing_alone(rank, batches):
    model = sharded(lora_llama())
    calls = iter(range(1000))

    def fails_in_one(module, args):
        if rank == 1 and next(calls) == 5:
            raise OSError("disk on fire")

    layers_of(model)[1].register_forward_pre_hook(fails_in_one)
    scored(model, batches)


@pytest.mark.slow
def test_failure_within_the_model_ends_all_processes(tmp_path):
    """Guards against a process that waits for the others, which wait for it in its forward pass."""
    batches = batches_of(examples_for(lora_llama(), 9), 3)
    start = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as error:
        in_processes(2, tmp_path / "a", failing_alone, batches)
    assert "disk on fire" in str(error.value) or "Connection closed by peer" in str(error.value)
    assert time.monotonic() - start < 60 + 20  # Processes take a while to start.
