"""Ranks from scores: exact counts, in the models that PEFT builds."""

import itertools
import math
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fish_tuning import (
    calculate_fisher_information,
    create_ranks_from_fisher,
    score_with_perturbed_b,
)
from tests.models import (
    batches_of,
    examples_for,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    with_lora,
)

LINEAR = r"(?!.*(pooler|classifier|score)).*"


def weight_scores(sizes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        f"m{i}.weight": torch.rand(size, generator=draw) ** 4 * 10 ** float(i % 3)
        for i, size in enumerate(sizes)
    }


def ranks_of(arguments):
    return {name[1:].replace("\\", ""): r for name, r in arguments["rank_pattern"].items()}


def adapter_count(model):
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("seed", range(30))
def test_the_largest_count_within_the_budget(seed):
    """Guards against counts above the budget, or below what other ranks would reach."""
    draw = random.Random(seed)
    sizes = [(draw.randint(2, 9), draw.randint(2, 9)) for _ in range(draw.randint(1, 4))]
    max_rank = draw.randint(1, 4)
    limits = [min(max_rank, *size) for size in sizes]
    counts = {
        sum(r * sum(size) for r, size in zip(ranks, sizes, strict=True))
        for ranks in itertools.product(*(range(limit + 1) for limit in limits))
    }
    for budget in range(min(map(sum, sizes)), max(counts) + 3):
        found = create_ranks_from_fisher(weight_scores(sizes, seed), budget, max_rank=max_rank)
        ranks = ranks_of(found)
        used = sum(r * sum(sizes[int(name[1:])]) for name, r in ranks.items())
        assert used == max(count for count in counts if count <= budget)
        assert all(1 <= r <= limits[int(name[1:])] for name, r in ranks.items())


def test_ranks_in_proportion_to_root_mean_scores():
    """Guards D'Hondt's rule by numbers worked out by hand, and layers that are left out."""
    roots = {"a": 6.0, "b": 3.0, "c": 0.9, "d": 0.0}
    scores = {f"{n}.weight": torch.full((20, 20), root**2) for n, root in roots.items()}
    scores |= {"norm.weight": torch.full((20,), 1e9), "a.bias": torch.full((20,), 1e9)}
    found = create_ranks_from_fisher(scores, 6 * 40, scaling=2)
    assert ranks_of(found) == {"a": 4, "b": 2}
    assert found["alpha_pattern"] == {"^a": 8, "^b": 4}
    assert (found["r"], found["lora_alpha"]) == (4, 8)
    found = create_ranks_from_fisher(scores, 10 * 40 + 39, max_rank=5)
    assert ranks_of(found) == {"a": 5, "b": 4, "c": 1}
    found = create_ranks_from_fisher(scores, 2 * 40, names_to_exclude=r"^a\.")
    assert ranks_of(found) == {"b": 2}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("build", [tiny_bert, tiny_llama, tiny_gpt2, tiny_t5])
def test_count_of_the_model_that_peft_builds(build, seed):
    """Guards the count against PEFT's own, and patterns that match other modules, or none."""
    model = with_lora(build(), r=3)
    scores = score_with_perturbed_b(
        model, batches_of(examples_for(model, 4), 2), seed=seed, progress=False
    )
    costs = {}
    for name, tensor in scores.items():
        if ".lora_" in name:
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            costs[module] = costs.get(module, 0) + tensor.numel() // 3
    budget = random.Random(seed).randint(200, 6 * sum(costs.values()))
    arguments = create_ranks_from_fisher(scores, budget, max_rank=8)
    ranks = ranks_of(arguments)
    built = get_peft_model(build(), LoraConfig(**arguments))
    assert adapter_count(built) == sum(costs[name] * rank for name, rank in ranks.items())
    assert built.get_nb_trainable_parameters()[0] == adapter_count(built) <= budget
    assert budget - adapter_count(built) < 12
    for name, rank in ranks.items():
        layer = built.get_submodule(f"base_model.model.{name}")
        assert layer.r["default"] == rank and layer.scaling["default"] == 1


def test_names_that_end_alike():
    """Guards against a module that takes the rank of another whose name is the end of its own."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(6, 6)
            self.re_query = nn.Linear(6, 6)

    class Net(Block):
        def __init__(self):
            super().__init__()
            self.block = Block()

    values = {"query": 1.0, "re_query": 3.0, "block.query": 2.0, "block.re_query": 0.0}
    scores = {f"{name}.weight": torch.full((6, 6), v**2) for name, v in values.items()}
    arguments = create_ranks_from_fisher(scores, 6 * 12)
    assert ranks_of(arguments) == {"query": 1, "re_query": 3, "block.query": 2}
    built = get_peft_model(Net(), LoraConfig(**arguments))
    found = {
        n: m.r["default"] for n, m in built.base_model.model.named_modules() if hasattr(m, "r")
    }
    assert found == ranks_of(arguments)
    assert adapter_count(built) == 6 * 12


def test_lora_tells_what_the_full_weight_tells():
    """Guards the scale of LoRA's scores: A's sum over outputs differs between layers."""
    model = with_lora(tiny_bert(), r=64, lora_dropout=0.0, target_modules=["query", "dense"])
    batches = batches_of(examples_for(model, 8), 4)
    of_lora = score_with_perturbed_b(model, batches, progress=False)
    base = tiny_bert()
    of_weights = calculate_fisher_information(base, batches, progress=False)
    names = [n.removesuffix(".weight") for n in of_weights if n.endswith(".weight")]
    ratios = []
    for name in names:
        key = f"base_model.model.{name}.lora_A.default.weight"
        if key in of_lora:
            mean = of_lora[key].mean() / of_weights[f"{name}.weight"].shape[0]
            ratios.append(float(mean / of_weights[f"{name}.weight"].mean()))
    assert len(ratios) > 6
    scaling = 2.0  # alpha / r of `with_lora`
    assert all(math.isclose(ratio, scaling**2, rel_tol=0.35) for ratio in ratios), ratios


def test_odd_sizes_at_scale():
    """Guards the time for a large model whose sizes have no common divisor."""
    sizes = [(401, 401), (401, 1009)] * 24 + [(32_001, 8)]
    scores = {f"m{i}.weight": torch.ones(()).expand(s) for i, s in enumerate(sizes)}
    found = create_ranks_from_fisher(scores, 1_000_000, max_rank=64)
    used = sum(r * sum(sizes[int(name[1:])]) for name, r in ranks_of(found).items())
    assert used == 1_000_000


@pytest.mark.parametrize(
    ("scores", "budget", "message"),
    [
        ({"norm.weight": torch.ones(3)}, 10, "no scores of a LoRA or of a weight matrix"),
        ({"m.weight": torch.ones(3, 4)}, 6, "budget=6 has no room for a single rank.* takes 7"),
        ({"m.weight": -torch.ones(3, 4)}, 60, "negative, NaN or infinite"),
        ({"m.weight": torch.zeros(3, 4)}, 60, "all scores are 0, .* score_with_perturbed_b"),
        ({"m.lora_A.a.weight": torch.ones(2, 4)}, 60, "m has scores of one side"),
        (
            {f"m.lora_{s}.{n}.weight": torch.ones(2, 2) for s in "AB" for n in "ab"},
            60,
            "m has scores of two adapters",
        ),
        (
            {
                f"{m}.lora_{s}.a.weight": torch.ones((r, 4) if s == "A" else (4, r))
                for s in "AB"
                for m, r in (("x", 2), ("y", 3))
            },
            60,
            r"the scores are of ranks \[2, 3\]",
        ),
    ],
)
def test_refused(scores, budget, message):
    """Guards against ranks from scores that do not say what a rank is worth."""
    with pytest.raises(ValueError, match=message):
        create_ranks_from_fisher(scores, budget)
