"""A parameter's adapter is told by the place of its name, not by any part of the path."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fish_tuning import FishMask, apply_mask, get_mask
from fish_tuning.sparse.adapter_names import belongs_to_adapter
from tests.sparse.small import LORA, Mlp, random_mask


@pytest.mark.parametrize(
    "name",
    [
        "layers.{other}.q.lora_A.{adapter}.weight",
        "{other}.embed.lora_embedding_A.{adapter}",
        "{other}.q.lora_magnitude_vector.{adapter}.weight",
        "{other}.k.ia3_l.{adapter}",
        "{other}.k.vera_lambda_b.{adapter}",
        "{other}.q.oft_R.{adapter}.weight",
        "{other}.embed.token_adapter.trainable_tokens_delta.{adapter}",
        "head.modules_to_save.{adapter}.{other}.weight",
        "prompt_encoder.{adapter}.embedding.weight",
        "{other}.q.loras.{adapter}.lora_A",
    ],
)
@pytest.mark.parametrize(("adapter", "other"), [("0", "1"), ("model", "encoder")])
def test_only_the_place_of_the_adapter_counts(name, adapter, other):
    name = name.format(adapter=adapter, other=other)
    assert belongs_to_adapter(name, adapter)
    assert not belongs_to_adapter(name, other)


def test_a_base_parameter_belongs_to_no_adapter():
    assert not belongs_to_adapter("layers.0.q_proj.base_layer.bias", "0")


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def test_adapters_named_like_layers(tmp_path):
    """Guards against files that miss the tensors of layers named like another adapter."""
    torch.manual_seed(0)
    model = get_peft_model(Stack(), LoraConfig(**LORA), adapter_name="0")
    model.add_adapter("1", LoraConfig(**LORA))
    masks = {}
    for name in ("0", "1"):
        model.set_adapter(name)
        bits = random_mask(model, name, seed=int(name))
        masks[name] = FishMask(
            {n: b for n, b in bits.items() if ".lora_" in n and n.endswith(f".{name}.weight")}
        )
        apply_mask(model, masks[name])
    model.save_pretrained(tmp_path)
    for name, mask in masks.items():
        assert len(mask) == 4
        assert get_mask(model, name) == mask
        assert FishMask.from_pretrained(tmp_path / name) == mask
    loaded = PeftModel.from_pretrained(Stack(), tmp_path / "1", "1", is_trainable=True)
    apply_mask(loaded, FishMask.from_pretrained(tmp_path / "1"))
    loaded.load_adapter(tmp_path / "1", "1", is_trainable=True)


@pytest.mark.parametrize("head", [None, ["last"]])
def test_a_mask_goes_with_an_adapter_that_is_loaded_under_another_name(tmp_path, head):
    """Guards against masks that fit under one name alone: PEFT's files hold no names."""
    torch.manual_seed(0)
    config = LoraConfig(**LORA, modules_to_save=head)
    model = get_peft_model(Mlp(), config, adapter_name="mine")
    apply_mask(model, random_mask(model, "mine"))
    model.save_pretrained(tmp_path)
    mask = FishMask.from_pretrained(tmp_path / "mine")
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path / "mine", is_trainable=True)
    apply_mask(loaded, mask)
    found = get_mask(loaded, "default")
    assert len(found) == len(mask)
    assert found == FishMask({n.replace(".mine", ".default"): bits for n, bits in mask.items()})
    assert found.provenance == mask.provenance


def test_a_mask_of_another_adapter_of_the_model_is_not_renamed():
    """Guards against the mask of one adapter that is put on another by mistake."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), LoraConfig(**LORA), adapter_name="mine")
    mask = FishMask(random_mask(model, "mine"))
    model.add_adapter("other", LoraConfig(**LORA))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="frozen parameters"):
        apply_mask(model, mask)
