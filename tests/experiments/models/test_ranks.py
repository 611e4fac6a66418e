"""Ranks by Fisher information: counted as PEFT's own model has them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.adapters import adapted_without_weights, trainable_tensors
from fish_tuning.experiments.models.counts import count_parameters
from fish_tuning.experiments.models.load import meta_model
from fish_tuning.experiments.models.ranks import choose_ranks
from tests.experiments.models.arm_counts import BERT_TINY, of_model, trainable

RANKS = "LoRA-FISH-ranks"


def with_ranks(folder, **changes):
    fish = {"methods_to_run": ["Original LoRA", RANKS], "budgets": [1.0, 0.7, 0.5]}
    return of_model(BERT_TINY, folder, fish_tuning=fish, **changes)


@pytest.mark.parametrize("target", [["query", "key", "value"], "all-linear"])
def test_the_count_is_that_of_pefts_model(tmp_path, target):
    """Guards the plan: the number that it promises is the number that PEFT trains."""
    config = with_ranks(tmp_path, lora={"target_modules": target, "baseline_rank": 3})
    counts = count_parameters(config, 2)
    baseline = counts["Original LoRA", None].trainable
    arm = planned(config)[-1]
    tensors = trainable_tensors(adapted_without_weights(config, arm, 2))
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        scores = {n: torch.rand(t.shape, generator=draw) ** 8 for n, t in tensors.items()}
        for ratio in (1.0, 0.7, 0.5):
            budget = round(ratio * baseline)
            ranks = choose_ranks(scores, budget)
            model = get_peft_model(
                meta_model(config.model, 2), LoraConfig(task_type="SEQ_CLS", **ranks)
            )
            assert model.get_nb_trainable_parameters()[0] == counts[RANKS, ratio].trainable
            assert budget - 256 < counts[RANKS, ratio].trainable <= budget
            scalings = {
                scaling
                for module in model.modules()
                if isinstance(module, LoraLayer)
                for scaling in module.scaling.values()
            }
            assert scalings == {2.0}
    # Equal ranks are among those that can be chosen.
    assert counts[RANKS, 1.0] == counts["Original LoRA", None]


def test_a_budget_without_room(tmp_path):
    """Guards the message about a head that takes all of the budget, or all but a few."""
    for ratio, problem in ((0.1, "258 are trained without"), (0.4, "no room for a single rank")):
        fish = {"methods_to_run": [RANKS], "budgets": [ratio]}
        lora = {"baseline_rank": 1, "target_modules": ["value"]}
        with pytest.raises(ConfigError, match=rf"fish_tuning\.budgets: {ratio}.*{problem}"):
            trainable(of_model(BERT_TINY, tmp_path, fish_tuning=fish, lora=lora), 2)
