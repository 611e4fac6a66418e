"""Whatever is combined, the scores are those of a loop, or one sentence says why there are none."""

import pytest
import torch

from fish_tuning import calculate_fisher_information
from tests.models import assert_scores_close
from tests.scoring.combinations import draw, reference

ROUNDING = 2e-5
"""transformers rounds a language model's logits to float32 in its own loss."""

LONGEST_SENTENCE = 600


def check(seed: int) -> str | None:
    """Raise if the scores are silently wrong; return the message if they are refused."""
    combination = draw(seed)
    modes = {name: module.training for name, module in combination.model.named_modules()}
    scores, refusal = None, None
    try:
        scores = calculate_fisher_information(
            combination.model, combination.loader, progress=False, **combination.options
        )
    except ValueError as error:
        refusal = str(error)
    after = {name: module.training for name, module in combination.model.named_modules()}
    changed = modes.items() ^ after.items()
    assert not changed, f"{combination.name}: scoring changed {changed}"
    if refusal is not None:
        assert combination.may_refuse, f"{combination.name} is refused: {refusal}"
        assert len(refusal) < LONGEST_SENTENCE, combination.name
        return refusal
    assert not combination.must_refuse, (
        f"{combination.name} is scored, though no example has a loss of its own"
    )
    try:
        assert_scores_close(scores, reference(combination), rtol=ROUNDING)
    except AssertionError as error:
        raise AssertionError(f"{combination.name}: {str(error)[:300]}") from None
    return None


def run(seeds: range) -> list[str]:
    failures = []
    for seed in seeds:
        torch.manual_seed(0)
        try:
            check(seed)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}"[:400])
    return failures


def test_some_combinations():
    """Guards every form of batch and every loss, a few of each."""
    assert run(range(40)) == []


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 2200, 100))
def test_many_combinations(start):
    """Guards combinations that nobody thought of: 1,200 of them."""
    assert run(range(start, start + 100)) == []
