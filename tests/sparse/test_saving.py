"""Masks lie beside the weights they describe; weights of another mask are refused."""

import copy

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from fish_tuning import FishMask, apply_mask, get_mask, remove_mask
from fish_tuning.sparse.saving import check_checkpoint
from tests.models import tiny_llama
from tests.sparse.small import LORA, Mlp, inputs, lora_mlp, random_mask, train


def masked(seed=0):
    model = lora_mlp()
    return apply_mask(model, random_mask(model, seed=seed))


def test_an_adapter_of_another_name(tmp_path):
    """Guards against a mask one folder above the weights."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), LoraConfig(**LORA), adapter_name="mine")
    mask = random_mask(model, "mine")
    apply_mask(model, mask).save_pretrained(tmp_path)
    assert not (tmp_path / "fish_mask.json").exists()
    assert FishMask.from_pretrained(tmp_path / "mine") == FishMask(mask)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path / "mine", "mine", is_trainable=True)
    assert get_mask(apply_mask(loaded, FishMask.from_pretrained(tmp_path / "mine"))) == FishMask(
        mask
    )
    check_checkpoint(model, tmp_path)


def test_an_unmasked_adapter_beside(tmp_path):
    """Guards against a mask in the folder of an adapter that has none."""
    model = masked()
    model.add_adapter("other", LoraConfig(**LORA))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not list(tmp_path.rglob("fish_mask.json"))
    model.save_pretrained(tmp_path)
    assert [f.parent for f in tmp_path.rglob("fish_mask.json")] == [tmp_path]


def test_parameters_chosen_by_hand_are_saved_as_tensors(tmp_path):
    """Guards against files that hold values, and lack tensors of which nothing is selected.

    LLaVA's and FastChat's training scripts save what named_parameters lists.
    """
    model = lora_mlp()
    mask = random_mask(model)
    unselected = next(name for name in mask if "lora_A" in name)
    mask[unselected] = torch.zeros_like(mask[unselected])
    train(apply_mask(model, mask))
    chosen = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    expected = copy.deepcopy(get_peft_model_state_dict(model))
    train(model)
    model.save_pretrained(tmp_path, state_dict=chosen)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    FishMask.from_pretrained(tmp_path)


def test_weights_of_another_mask_are_refused(tmp_path):
    """Guards against resuming in a loop of one's own with other entries than were trained."""
    model, other = masked(), masked(seed=1)
    train(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another mask than adapter 'default'.*from_pretrained"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"another mask: it selects other entries of .*lora_"):
        other.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
    with pytest.raises(ValueError, match="was trained with another mask: resume with"):
        check_checkpoint(other, tmp_path)
    same = masked()
    same.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(same(inputs()), model(inputs()))
    masked().load_state_dict(state)
    lora_mlp().load_state_dict(state)


def test_weights_saved_without_the_mask_are_noticed(tmp_path):
    """Guards against the mask of an earlier save beside weights that were trained densely."""
    model = masked()
    model.save_pretrained(tmp_path)
    mask = FishMask.from_pretrained(tmp_path)
    train(remove_mask(model))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model.*without the mask.*delete fish_mask.json"):
        FishMask.from_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert FishMask.from_pretrained(tmp_path) == mask


def test_adapters_of_transformers(tmp_path):
    """Guards against the mask of another adapter than the one that is saved, and its card."""
    model = tiny_llama()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for seed, name in enumerate(("mine", "other")):
        model.add_adapter(config, adapter_name=name)
        apply_mask(model, random_mask(model, name, seed))
    for name in ("mine", "other"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        mask = FishMask.from_pretrained(tmp_path / name)
        assert mask == get_mask(model, name)
        code = ModelCard.load(tmp_path / name / "README.md").text.split("```")[1]
        names = {"model": tiny_llama(), "source": tmp_path / name}
        exec(code.removeprefix("python"), names)
        assert get_mask(names["model"]) == mask
    model.add_adapter(config, adapter_name="unmasked")
    model.set_adapter("unmasked")
    model.save_pretrained(tmp_path / "unmasked")
    assert not list((tmp_path / "unmasked").glob("fish_mask*"))
