"""A rule of thumb for learning rates, beside the rates that the study found."""

import pytest
import torch

from fish_tuning.selection.learning_rate import advice_on_rate, rate_factor

STUDY = {
    0.5: (1.0, 1.0, 1.7, 1.7, 1.8),
    0.25: (1.7, 1.8, 3.0),
    0.125: (1.7, 1.8, 5.2),
    0.0208: (5.3, 9.0, 9.0, 16.0, 27.0),
}


def mask_of(density):
    bits = torch.zeros(10_000, dtype=torch.bool)
    bits[: round(10_000 * density)] = True
    return {"q_proj.lora_A.weight": bits, "score.weight": torch.ones(7, dtype=torch.bool)}


def optimizer_of(rate, kind=torch.optim.AdamW):
    return kind([torch.nn.Parameter(torch.zeros(1))], lr=rate)


@pytest.mark.parametrize("density", STUDY)
def test_the_rule_is_near_what_the_study_found(density):
    """Guards the rule and the table in the guide: the geometric mean of the tasks, within half."""
    found = torch.tensor(STUDY[density]).log().mean().exp()
    assert rate_factor(mask_of(density)) == pytest.approx(float(found), rel=0.5)


def test_what_does_not_count():
    """Guards the head, tensors of other kinds, and masks of everything or nothing."""
    half = {"q_proj.weight": torch.tensor([True, False])}
    assert rate_factor(mask_of(0.25) | half) == rate_factor(mask_of(0.25))
    for mask in ({}, half, mask_of(0.0), mask_of(1.0)):
        assert rate_factor(mask) == 1.0


def test_advice():
    """Guards against advice where nothing is known, where it is not needed, and its numbers."""
    advice = advice_on_rate(mask_of(0.02), optimizer_of(2e-4))
    assert advice is not None
    assert "0.0002 may be too low: the mask selects 2.0% of LoRA's entries" in advice
    assert "about 10 times the rate that suits dense LoRA" in advice
    assert advice_on_rate(mask_of(0.02), optimizer_of(1e-2)) is None
    assert advice_on_rate(mask_of(0.5), optimizer_of(2e-4)) is None
    assert advice_on_rate(mask_of(0.02), optimizer_of(2e-4, torch.optim.SGD)) is None


def test_the_first_rate_of_a_schedule_is_not_taken_for_the_rate():
    """Guards warm-up, which starts at 0."""
    optimizer = optimizer_of(1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0
    assert advice_on_rate(mask_of(0.02), optimizer) is None
