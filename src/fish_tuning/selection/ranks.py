"""Scores and a budget -> a rank for every layer, as PEFT's LoraConfig takes them."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fish_tuning.arguments import check_integer, check_scores
from fish_tuning.names import exactly, kind_of, opposite_side
from fish_tuning.parts import whole
from fish_tuning.selection.budget import not_matching, patterns_of

_WRAPPER = "base_model.model."


@dataclass(frozen=True)
class _Module:
    """A module that LoRA can adapt.

    Attributes:
        cost: Parameters of a LoRA of rank 1.
        worth: Root of the mean Fisher information of the full weight.
        max_rank: A higher rank adds nothing.
    """

    cost: int
    worth: float
    max_rank: int


def create_ranks_from_fisher(
    fisher_scores: Mapping[str, Tensor],
    budget: int,
    *,
    max_rank: int = 64,
    names_to_exclude: Sequence[str] | str | None = None,
    scaling: float = 1.0,
) -> dict[str, Any]:
    """Choose a LoRA rank for every module, for a budget of adapter parameters.

    Adam moves every entry of A and B about equally far, so to first order a rank is worth
    (in + out) sqrt(F), where F is the mean Fisher information of the full weight's entries. It
    costs in + out parameters. The r-th rank of a module is taken to be worth 1/r of the first.
    Ranks are handed out in the order of what they are worth per parameter,

        sqrt(F_module) / r,

    which is D'Hondt's method: ranks in proportion to sqrt(F), the root mean score by which
    `scope="adaptive"` divides a budget too. A rank is passed over if the largest number of
    parameters that any ranks from 0 to `max_rank` can have within the budget could not be reached
    with it. So the number of parameters is exact: it is this largest number.

    Args:
        fisher_scores: Fisher information by parameter name: either of a LoRA of one rank and one
            alpha at its usual start, from `score_with_perturbed_b`, or of the model's own weights,
            of which the matrices count.
        budget: Adapter parameters: A and B of all modules. The head is not part of it.
        max_rank: The highest rank of a module. No rank is above the size of the module's input or
            output.
        names_to_exclude: Regular expressions of parameter names that get no adapter.
        scaling: alpha / rank, the same in all modules.

    Returns:
        Arguments of `peft.LoraConfig` (`r`, `lora_alpha`, `target_modules`, `rank_pattern` and
        `alpha_pattern`). Modules of rank 0 are not among the target modules.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are no scores of a LoRA or of matrices, LoRA's A was scored at B = 0,
            ranks differ, or the budget has no room for a single rank.

    Examples:
        >>> scores = score_with_perturbed_b(model, loader)
        >>> ranks = create_ranks_from_fisher(scores, budget=1_000)
        >>> model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **ranks))
    """
    check_scores("fisher_scores", fisher_scores)
    check_integer("budget", budget, 1)
    check_integer("max_rank", max_rank, 1)
    kept = set(not_matching(fisher_scores, patterns_of(names_to_exclude)))
    modules = _modules({name: t for name, t in fisher_scores.items() if name in kept}, max_rank)
    ranks = _ranks(modules, budget)
    highest = max(ranks.values())
    patterns = {name: rf"^{re.escape(name)}" for name in ranks}
    return {
        "r": highest,
        "lora_alpha": scaling * highest,
        "target_modules": exactly(ranks),
        "rank_pattern": {patterns[name]: rank for name, rank in ranks.items()},
        "alpha_pattern": {patterns[name]: scaling * rank for name, rank in ranks.items()},
    }


def _modules(scores: Mapping[str, Tensor], max_rank: int) -> dict[str, _Module]:
    of_lora = any(kind_of(name) for name in scores)
    modules = _lora_modules(scores, max_rank) if of_lora else _matrices(scores, max_rank)
    if not modules:
        raise ValueError(
            "there are no scores of a LoRA or of a weight matrix: score a model with LoRA by "
            "score_with_perturbed_b, or a model whose own weights require gradients"
        )
    if not any(module.worth for module in modules.values()):
        raise ValueError(
            "all scores are 0, as those of LoRA's A are while B is 0: score with "
            "score_with_perturbed_b"
        )
    if not all(math.isfinite(module.worth) for module in modules.values()):
        raise ValueError("scores that are negative, NaN or infinite are not Fisher information")
    return modules


def _matrices(scores: Mapping[str, Tensor], max_rank: int) -> dict[str, _Module]:
    return {
        name.removesuffix(".weight"): _Module(
            sum(score.shape),
            _root(_mean(score)),
            min(max_rank, *score.shape),
        )
        for name, score in scores.items()
        if name.endswith(".weight") and score.ndim == 2 and score.numel()
    }


def _lora_modules(scores: Mapping[str, Tensor], max_rank: int) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    ranks = set()
    for name, score in scores.items():
        # The side that does not start at zero: its perturbed scores are sums over the full weight.
        if kind_of(name) not in ("A", "embedding_B"):
            continue
        opposite = scores.get(opposite_side(name))
        module = re.split(r"\.lora_", name.removeprefix(_WRAPPER))[0]
        if opposite is None or module in modules:
            raise ValueError(
                f"{module} has scores of {'two adapters' if opposite is not None else 'one side'}: "
                "give those of both sides of one LoRA"
            )
        rank = score.shape[0] if kind_of(name) == "A" else score.shape[1]
        ranks.add(rank)
        size, others = score.numel() // rank, opposite.numel() // rank
        worth = _root(_mean(score) / others)
        modules[module] = _Module(size + others, worth, min(max_rank, size, others))
    if len(ranks) > 1:
        raise ValueError(
            f"the scores are of ranks {sorted(ranks)}, whose scaling may differ: score a LoRA with "
            "the same rank in all modules"
        )
    return modules


def _mean(score: Tensor) -> float:
    return float(whole(score).double().mean())


def _root(mean: float) -> float:
    return math.sqrt(mean) if mean >= 0 else math.nan


def _ranks(modules: Mapping[str, _Module], budget: int) -> dict[str, int]:
    """The rank of every module that gets one, in the order of the modules."""
    unit = math.gcd(*(module.cost for module in modules.values()))
    # Every rank of every module, those worth most per parameter first: (module, cost in units).
    queue = sorted(
        (-module.worth / rank, rank, name, module.cost // unit)
        for name, module in modules.items()
        for rank in range(1, module.max_rank + 1)
    )
    left = [(name, cost) for *_, name, cost in queue]
    target = _sums(left, budget // unit).bit_length() - 1
    if target < 1:
        cheapest = min(module.cost for module in modules.values())
        raise ValueError(
            f"budget={budget:,} has no room for a single rank: the smallest takes {cheapest:,} "
            "parameters"
        )
    ranks: Counter[str] = Counter()

    def too_many(number: int) -> bool:
        """Whether the target is out of reach once this many of the next ranks are taken."""
        rest = target - sum(cost for _, cost in left[:number])
        return rest < 0 or not _sums(left[number:], rest) >> rest & 1

    while target:
        taken = bisect_left(range(1, len(left) + 1), True, key=too_many)
        ranks.update(name for name, _ in left[:taken])
        target -= sum(cost for _, cost in left[:taken])
        # No way to the target takes the next rank, nor a later one at the same cost.
        left = [item for item in left[taken:] if item[1] != left[taken][1]] if target else []
    return {name: ranks[name] for name in modules if ranks[name]}


def _sums(items: Sequence[tuple[str, int]], limit: int) -> int:
    """Which sums some of the items can have, up to a limit: bit s is set if s is such a sum."""
    sums, within = 1, (1 << limit + 1) - 1
    for cost, number in Counter(cost for _, cost in items).items():
        # Groups of 1, 2, 4, ... and the rest: some of them are together as many as wanted.
        size = 1
        while number:
            group = min(size, number)
            sums |= sums << group * cost & within
            number -= group
            size *= 2
    return sums
