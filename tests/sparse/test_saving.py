"""Masks lie beside the weights they describe; weights of another mask are refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fish_tuning import FishMask, apply_mask, get_mask
from fish_tuning.sparse.saving import check_checkpoint
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
