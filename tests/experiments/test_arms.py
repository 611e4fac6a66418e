"""Which runs an experiment has, and in which order."""

import re
import subprocess
import sys

from fish_tuning.experiments.arms import planned, searched
from tests.experiments.tiny_experiment import ALL_ARMS, experiment


def test_the_plan(tmp_path):
    """Guards the order, and that arms without a budget run once per seed."""
    config = experiment(
        tmp_path,
        tmp_path,
        tmp_path,
        fish_tuning={"methods_to_run": ["Original LoRA", "LoRA-FISH"], "budgets": [1.0, 0.25]},
        peers=[{"method": "IA3"}],
        seeds=[1, 2],
    )
    assert [(arm.name, arm.ratio, arm.seed) for arm in planned(config)] == [
        ("Original LoRA", None, 1),
        ("LoRA-FISH", 1.0, 1),
        ("IA3", None, 1),
        ("Original LoRA", None, 2),
        ("LoRA-FISH", 1.0, 2),
        ("IA3", None, 2),
        ("LoRA-FISH", 0.25, 1),
        ("LoRA-FISH", 0.25, 2),
    ]


def test_run_ids(tmp_path):
    """Guards the folders: safe names, distinct where runs differ, the same where they do not."""

    def ids(**changes):
        fish = {"methods_to_run": ALL_ARMS, "budgets": [1.0, 0.5, 0.3333333, 0.3333334]}
        config = experiment(tmp_path, tmp_path, tmp_path, **{"fish_tuning": fish, **changes})
        return [arm.run_id for arm in planned(config)]

    found = ids(peers=[{"method": "IA3", "name": "a/b"}, {"method": "IA3", "name": "a\\b"}])
    assert len(set(found)) == len(found) == 3 + 3 * 4 + 2
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in found)
    assert set(ids()) < set(found) and set(ids()) < set(ids(seeds=[1, 2]))
    assert not set(ids()) & set(ids(lora={"dropout": 0.1}))
    one, other = (
        ids(peers=[{"method": "IA3", "config": c}]) for c in ({}, {"fan_in_fan_out": True})
    )
    assert len(set(one) ^ set(other)) == 2


def test_the_plan_needs_no_torch():
    """Guards the command line's speed: the list of arms comes without slow imports."""
    code = "import sys, fish_tuning.experiments.arms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_rates_of_single_arms(tmp_path):
    """Guards given learning rates: used as they are, not searched, and not part of the digest."""
    settings = {"fish_tuning": {"methods_to_run": ["Original LoRA", "LoRA-FISH"]}}
    config = experiment(tmp_path, tmp_path, tmp_path, **settings)
    given = experiment(tmp_path, tmp_path, tmp_path, learning_rates={"LoRA-FISH": 3e-2}, **settings)
    assert [arm.learning_rate for arm in planned(given)] == [None, 3e-2]
    assert planned(given)[1].run_id == planned(config, {("LoRA-FISH", 1.0): 3e-2})[0].run_id
    search = {"values": [1e-3, 2e-3]}
    both = experiment(
        tmp_path,
        tmp_path,
        tmp_path,
        learning_rates={"LoRA-FISH": 3e-2},
        learning_rate_search=search,
        **settings,
    )
    assert {arm.name for arm in searched(both)} == {"Original LoRA"}
    rates = [arm.learning_rate for arm in planned(both, {("Original LoRA", None): 1e-3})]
    assert rates == [1e-3, 3e-2]
    assert [arm.name for arm in planned(both, {})] == ["LoRA-FISH"]


def test_rates_to_try_of_single_arms(tmp_path):
    """Guards searches whose arms want different rates: an arm's list replaces the search's."""
    config = experiment(
        tmp_path,
        tmp_path,
        tmp_path,
        fish_tuning={"methods_to_run": ["Original LoRA", "LoRA-FISH"]},
        learning_rates={"LoRA-FISH": [1e-2, 2e-2, 4e-2]},
        learning_rate_search={"values": [1e-3, 2e-3]},
    )
    tried = [(arm.name, arm.learning_rate) for arm in searched(config)]
    assert tried == [
        ("Original LoRA", 1e-3),
        ("Original LoRA", 2e-3),
        ("LoRA-FISH", 1e-2),
        ("LoRA-FISH", 2e-2),
        ("LoRA-FISH", 4e-2),
    ]
    assert [arm.learning_rate for arm in planned(config, {("LoRA-FISH", 1.0): 2e-2})] == [2e-2]
