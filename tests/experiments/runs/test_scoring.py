"""How a masked arm of an experiment selects: as get_fish_model does."""

import copy

import numpy as np
import pytest
from torch.utils.data import DataLoader

from fish_tuning import FishConfig, get_fish_model, get_mask
from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.runs.scoring import select
from tests.experiments.tiny_experiment import experiment
from tests.models import batches_of, examples_for, tiny_bert, with_lora

BUDGET = 200


class Examples(list):
    """A data set with as much of datasets' interface as the selection uses."""

    def select(self, rows):
        return [self[row] for row in rows]


def collated(examples):
    (batch,) = batches_of(examples, len(examples))
    return batch


def no_warmup(steps):
    raise AssertionError("a warm-up was asked for")


@pytest.mark.parametrize("criterion", ["fisher", "reversed", "random", "magnitude"])
@pytest.mark.parametrize("point", ["start", "perturbed"])
def test_an_arm_selects_as_get_fish_model(criterion, point):
    """Guards settings and flow against existing twice, and drifting apart."""
    rule = {"scope": "per_tensor", "scoring_point": point, "num_samples": 6}
    variant = {"name": "v", "criterion": criterion, "rule": rule}
    config = experiment("m", "d", "o", fish_tuning={"methods_to_run": [], "variants": [variant]})
    arm = planned(config)[-1]
    model = with_lora(tiny_bert())
    examples = Examples(examples_for(model, 8))
    expected = copy.deepcopy(model)
    selection = select(model, arm, config, BUDGET, examples, collated, no_warmup)

    rows = np.random.default_rng(arm.seed).permutation(8)[:6]
    settings = FishConfig(
        num_trainable=BUDGET,
        criterion=criterion,
        scope="per_tensor",
        scoring_point=point,
        num_samples=6,
        seed=arm.seed,
        names_to_exclude=("classifier",),
    )
    loader = DataLoader(examples.select(rows), batch_size=8, collate_fn=collated)
    get_fish_model(expected, settings, loader, progress=False)
    assert selection.mask == get_mask(expected)
    assert selection.mask.num_trainable == BUDGET
    assert bool(selection.histograms) == (criterion in ("fisher", "reversed"))
    recorded = {
        key: selection.mask.provenance[key] for key in ("criterion", "scoring_point", "seed")
    }
    assert recorded == {"criterion": criterion, "scoring_point": point, "seed": arm.seed}
