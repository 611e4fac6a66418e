"""Every kind of arm on a language model: planned, trained and counted to the unit."""

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.counts import count_parameters
from fish_tuning.experiments.runs import training
from fish_tuning.experiments.runs.sweep import run_experiment
from tests.experiments.tiny_language_model import generative, language_model, write_pairs

ALL_LINEAR = {
    "method": "LORA",
    "config": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
}
MLP = {"method": "LORA", "config": {"r": 8, "target_modules": ["up_proj", "down_proj"]}}
VARIANTS = [
    {"name": "FISH", "adapter": ALL_LINEAR},
    {"name": "random", "criterion": "random", "adapter": ALL_LINEAR},
    {"name": "reversed", "criterion": "reversed", "adapter": ALL_LINEAR},
    {"name": "FISH mlp", "adapter": MLP},
    {"name": "FISH own weights", "own_weights": "all-linear"},
    {"name": "random own weights", "criterion": "random", "own_weights": ["q_proj", "v_proj"]},
    {"name": "reversed own weights", "criterion": "reversed", "own_weights": r".*\.mlp\..*_proj"},
    {
        "name": "magnitude own weights",
        "criterion": "magnitude",
        "own_weights": "all-linear",
        "rule": {"scope": "per_tensor"},
    },
]
PEERS = [
    {"method": "SHIRA", "config": {"r": 3}},
    {"method": "SUPERTUNING", "config": {"sparsity": 0.5625}},
]
BF16 = {"bf16": True}
OWN_WEIGHTS = [variant for variant in VARIANTS if "own_weights" in variant]


def with_arms(model, data, output_dir, /, **changes):
    sections = {
        "lora": {"baseline_rank": 3, "fish_rank": 8},
        "training": {"args_override": {"max_steps": 3, "eval_steps": 3, "save_steps": 3, **BF16}},
        "fish_tuning": {"methods_to_run": ["Original LoRA", "LoRA-FA"], "variants": VARIANTS},
        "peers": PEERS,
        **changes,
    }
    return generative(model, data, output_dir, **sections)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny language model whose head is tied to its embeddings, as SmolLM2's is."""
    return language_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    """A sweep of all arms, and the counts that its plan gave."""
    folder = tmp_path_factory.mktemp("arms")
    config = with_arms(model, write_pairs(folder / "pairs.jsonl"), folder / "out")
    return folder / "out", count_parameters(config, 0), run_experiment(config, name="arms").runs


def test_every_arm_trains_what_is_planned(swept, model):
    """Guards equal budgets, and totals that count a tied head once."""
    _, counts, runs = swept
    names = [*(v["name"] for v in VARIANTS), "SHIRA", "SUPERTUNING"]
    assert {run.arm for run in runs} == {"Original LoRA", "LoRA-FA", *names}
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    for run in runs:
        assert run.status == "finished", (run.arm, run.error)
        count = counts[run.arm, run.ratio]
        assert run.trainable_params == run.budget == count.trainable
        assert 0 < run.changed_params <= run.trainable_params
        assert run.total_params == count.total
        if run.arm != "LoRA-FA":
            assert run.trainable_params == 672, run.arm
        added = {"own weights": 0, "SHIRA": 672, "SUPERTUNING": 672}
        for kind, number in added.items():
            assert not run.arm.endswith(kind) or run.total_params == base + number


def test_own_weights_are_chosen_in_the_modules_that_are_named(swept):
    """Guards against a pool of other tensors than those that the config names."""
    names = {run.arm: {density.name for density in run.mask_density} for run in swept[2]}
    assert len(names["FISH own weights"]) == 14
    assert names["random own weights"] == {
        f"model.layers.{layer}.self_attn.{side}_proj.weight" for layer in (0, 1) for side in "qv"
    }
    assert all(".mlp." in name for name in names["reversed own weights"])


@pytest.mark.parametrize("arm", [variant["name"] for variant in OWN_WEIGHTS])
def test_own_weights_are_loaded_by_peft_alone(arm, swept, model):
    """Guards the adapters that are kept in the place of a copy of the model."""
    folder, _, runs = swept
    run = next(run for run in runs if run.arm == arm)
    base = AutoModelForCausalLM.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    kept = sorted((folder / run.adapter).rglob("adapter_config.json"))
    assert kept
    for config in kept:
        base = PeftModel.from_pretrained(base, config.parent).merge_and_unload()
    changed = sum(int((base.state_dict()[n] != t).sum()) for n, t in before.items())
    assert changed == run.changed_params
    sizes = [(config.parent / "adapter_model.safetensors").stat().st_size for config in kept]
    assert run.adapter_bytes == sum(sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"own_weights": "all-linear", "adapter": MLP}, r"own_weights: is given beside adapter"),
        ({"own_weights": ["nope"]}, r"^fish_tuning\.variants: x: own_weights: \['nope'\] does not"),
        ({"own_weights": ["embed_tokens"]}, r"own_weights: model\.embed_tokens is not a linear"),
        ({"own_weights": ["lm_head"]}, r"own_weights: lm_head is not a linear layer with a weight"),
        ({}, r"changes nothing"),
    ],
)
def test_wrong_own_weights(changes, message, model, tmp_path):
    """Guards a pool that is not there or given twice."""
    fish = {"methods_to_run": ["Original LoRA"], "variants": [{"name": "x", **changes}]}
    with pytest.raises((ConfigError, ValueError), match=message):
        count_parameters(with_arms(model, "unused", tmp_path, fish_tuning=fish, peers=[]), 0)


@pytest.mark.parametrize("section", [{"precision": "bf16"}, {"quantization": "4bit"}])
def test_own_weights_need_full_precision(section, model, tmp_path):
    """Guards against small updates that are rounded away."""
    with pytest.raises(ValueError, match=r"own_weights: trains the model's own weights, which"):
        with_arms(model, "unused", tmp_path, model=section)


def test_an_interrupted_run_of_own_weights_goes_on(model, tmp_path, monkeypatch):
    """Guards checkpoints, which hold the model in the place of an adapter."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    fish = {"methods_to_run": ["Original LoRA"], "variants": OWN_WEIGHTS[:1]}
    args = {"max_steps": 6, "eval_steps": 2, "save_steps": 2}
    genuine, reached, stop_at = training.run_arm, [], [5]

    def watched(arm, experiment, folder, report):
        def reporting(step, *rest):
            reached.append(step)
            if arm.own_weights and step in stop_at:
                raise KeyboardInterrupt

        return genuine(arm, experiment, folder, reporting)

    def sweep(name):
        config = with_arms(
            *(model, data, tmp_path / name),
            fish_tuning=fish,
            peers=[],
            training={"args_override": args},
        )
        return run_experiment(config, name="e").runs[-1]

    def kept(name, run):
        files = sorted((tmp_path / name / run.adapter).rglob("adapter_model.safetensors"))
        return [file.read_bytes() for file in files]

    undisturbed = sweep("one")
    monkeypatch.setattr(training, "run_arm", watched)
    with pytest.raises(KeyboardInterrupt):
        sweep("two")
    reached.clear()
    stop_at.clear()
    resumed = sweep("two")
    assert reached == [5, 6]
    assert resumed.metrics == undisturbed.metrics and resumed.curve == undisturbed.curve
    assert kept("two", resumed) == kept("one", undisturbed) != []
