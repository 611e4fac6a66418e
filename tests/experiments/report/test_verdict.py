"""The verdict: what is ahead of what, by how much, and when seeds cannot tell."""

import pytest

from fish_tuning.experiments.report.comparison import SearchSummary, compare, pool
from fish_tuning.experiments.report.verdict import pooled_verdict, search_verdict, verdict
from fish_tuning.experiments.results import Results
from tests.experiments.sweep_sample import make_run


def sweep(metric="accuracy", **values):
    """A sweep whose arms have these values of a metric, one per seed."""
    names = {"lora": "Original LoRA", "fish": "LoRA-FISH", "rand": "LoRA-FISH-rand"}
    runs = [
        make_run(
            names.get(arm, arm),
            seed,
            None if arm == "lora" else 1.0,
            main_metric=metric,
            metrics={metric: value},
        )
        for arm, of_arm in values.items()
        for seed, value in enumerate(of_arm)
    ]
    return Results(name="made", config={}, runs=runs)


def sentences(**values):
    return [str(finding) for finding in verdict(compare(sweep(**values)))]


def test_ahead_by_how_much():
    """Guards the winner, the amount and the interval."""
    found = sentences(lora=[0.5, 0.6, 0.5], fish=[0.6, 0.7, 0.6])
    assert found[:2] == [
        "LoRA-FISH has the highest Accuracy: 0.6333 on average over 3 seeds; "
        "Original LoRA has 0.5333.",
        "Ahead of Original LoRA: LoRA-FISH by 0.1000 (interval 0.1000 to 0.1000).",
    ]
    assert "3 seeds, which is few" in found[-1] and "in 1 of 4 sweeps" in found[-1]


def test_lower_is_better():
    """Guards losses, of which the highest must not win."""
    found = sentences(metric="eval_loss", lora=[1.0, 1.1], fish=[0.8, 0.9])
    assert found[0].startswith("LoRA-FISH has the lowest Loss: 0.8500")
    assert found[1].startswith("Ahead of Original LoRA: LoRA-FISH by 0.2000")


def test_behind_and_undecided():
    """Guards against a difference that is called one where the interval holds 0."""
    values = {"lora": [0.5, 0.5, 0.5], "fish": [0.7, 0.4, 0.5], "rand": [0.3, 0.3, 0.2]}
    found = sentences(**values)
    assert found[1].startswith("Behind Original LoRA: LoRA-FISH-rand by 0.2333 (interval 0.2")
    assert found[2].startswith("No clear difference from Original LoRA: LoRA-FISH (+0.0333, ")
    assert found[3].startswith("Ahead of LoRA-FISH-rand: LoRA-FISH by 0.2667")


def test_one_seed_decides_nothing():
    """Guards against conclusions from one run of each arm."""
    found = sentences(lora=[0.5], fish=[0.9])
    assert len(found) == 2 and "cannot tell a difference from chance" in found[1]


def test_many_seeds_need_no_warning():
    """Guards the warning about few seeds, where there are enough."""
    found = sentences(lora=[0.5] * 6, fish=[0.6, 0.7, 0.6, 0.6, 0.7, 0.6])
    assert found[-1] == (
        "How sure: these are 95% intervals of the mean paired difference over 6 seeds."
    )


def test_without_a_baseline_the_best_arm_is_the_measure():
    """Guards sweeps that have no Original LoRA."""
    found = sentences(fish=[0.6, 0.7], peer=[0.5, 0.5])
    assert found[0] == "LoRA-FISH has the highest Accuracy: 0.6500 on average over 2 seeds."
    assert found[1].startswith("Behind LoRA-FISH: peer by 0.1500")


def test_a_control_that_is_the_best_arm():
    """Guards the other arms, which are compared with it too, and not only FISH."""
    found = sentences(rand=[0.6, 0.7, 0.6], fish=[0.6, 0.7, 0.5], other=[0.2, 0.3, 0.2])
    assert found[1].startswith("Behind LoRA-FISH-rand: other by 0.4000")
    assert found[2].startswith("No clear difference from LoRA-FISH-rand: LoRA-FISH (-0.0333")
    assert not any("Ahead" in sentence for sentence in found)


def test_arms_that_share_the_best_value():
    """Guards against naming the first of several equal arms as the best one."""
    found = sentences(lora=[0.9, 1.0], fish=[0.9, 1.0], rand=[1.0, 0.9], other=[0.5, 0.5])
    assert found[0] == (
        "Original LoRA, LoRA-FISH and LoRA-FISH-rand share the highest Accuracy: "
        "0.9500 on average over 2 seeds."
    )
    [unclear] = [text for text in found if text.startswith("No clear difference from Original")]
    assert "LoRA-FISH (the same with every seed); LoRA-FISH-rand (+0.0000, interval -" in unclear


def test_learning_rates_at_the_edge_of_a_search():
    """Guards against an arm that loses because the search ended too early."""
    searched = [
        SearchSummary("inside", {1e-3: None, 3e-3: None, 9e-3: None}, 3e-3),
        SearchSummary("high", {1e-3: None, 9e-3: None}, 9e-3),
        SearchSummary("low", {1e-3: None, 9e-3: None}, 1e-3),
        SearchSummary("only one", {1e-3: None}, 1e-3),
        SearchSummary("not yet known", {1e-3: None, 9e-3: None}, None),
    ]
    assert [str(finding) for finding in search_verdict(searched)] == [
        "The search chose the highest learning rate that it tried, and a higher one may be "
        "better: high (0.009).",
        "The search chose the lowest learning rate that it tried, and a lower one may be "
        "better: low (0.001).",
    ]


@pytest.mark.parametrize("runs", [[], [make_run("LoRA-FISH", 1, main_metric=None, metrics={})]])
def test_nothing_to_say(runs):
    """Guards sweeps without a result."""
    [finding] = verdict(compare(Results(name="none", config={}, runs=runs)))
    assert str(finding) == "No run has a metric yet."


def test_several_sweeps():
    """Guards the mean over experiments, and against adding accuracies to losses."""
    one = compare(sweep(lora=[0.5, 0.5], fish=[0.6, 0.6]))
    other = compare(sweep(lora=[0.5, 0.5], fish=[0.8, 0.8]))
    [finding] = pooled_verdict(pool([one, other]), "accuracy")
    assert str(finding).startswith("Ahead of Original LoRA: LoRA-FISH by 0.2000")
    loss = compare(sweep(metric="eval_loss", lora=[0.5, 0.5], fish=[0.8, 0.8]))
    assert pool([one, loss]) == []
