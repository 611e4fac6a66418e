"""A mask on a model's own weights as adapters that PEFT loads without this library."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel

from fish_tuning import FishMask, apply_mask, create_mask_from_fisher, save_as_peft_adapter
from tests.models import examples_for, pad, tiny_bert, tiny_gpt2, tiny_llama

pytest.importorskip("peft.tuners.supertuning")


def trained(base, mask_of, steps=3):
    """A model of its own weights after some steps under a mask, and its state before."""
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = apply_mask(base, FishMask({n: mask_of(n, p) for n, p in base.named_parameters()}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(**pad(examples_for(model, 4))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), start


def random_mask(density, of_linear=".layer."):
    """Densities that differ from layer to layer; nothing outside of the linear layers."""
    draw = torch.Generator().manual_seed(0)

    def mask_of(name, p):
        if p.ndim != 2 or of_linear not in name:
            return torch.full_like(p, "classifier" in name, dtype=torch.bool)
        return torch.rand(p.shape, generator=draw) < density(name)

    return mask_of


def uneven(name):
    return 0.02 if "layer.0" in name or "layers.0" in name else 0.3 if "query" in name else 0.1


def logits(model, batch):
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def loaded(base, folders):
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number in range(len(folders))])
    return model.eval()


@pytest.mark.parametrize("max_adapters", [1, 4])
@pytest.mark.parametrize(("build", "inside"), [(tiny_bert, ".layer."), (tiny_llama, ".layers.")])
def test_loaded_switched_off_and_merged_by_peft(tmp_path, build, inside, max_adapters):
    """Guards the logits: with the adapter, without it, and merged into the base."""
    model, start = trained(build(), random_mask(uneven, inside))
    batch = pad(examples_for(model, 6, seed=1))
    wanted, before = logits(model, batch), logits(build().eval(), batch)
    assert not torch.allclose(wanted, before, atol=1e-2)
    folders = save_as_peft_adapter(model, tmp_path / "x", start=start, max_adapters=max_adapters)
    assert len(folders) == 1 if max_adapters == 1 else 1 < len(folders) <= 4
    again = loaded(build(), folders)
    torch.testing.assert_close(logits(again, batch), wanted, rtol=0, atol=1e-6)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again, batch), before, rtol=0, atol=0)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), wanted, rtol=0, atol=1e-6)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_size(tmp_path):
    """Guards a small file: 8 bytes per selected weight, and one adapter if densities are equal."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    base = tiny_bert(**sizes)
    scores = {n: torch.rand(p.shape) for n, p in base.named_parameters() if ".layer." in n}
    scores = {n: t for n, t in scores.items() if t.ndim == 2}
    mask = create_mask_from_fisher(scores, 0.05, scope="per_tensor")
    model, start = trained(base, lambda n, p: mask.get(n, torch.zeros_like(p, dtype=torch.bool)))
    [folder] = save_as_peft_adapter(model, tmp_path / "x", start=start)
    weights = folder / "adapter_model.safetensors"
    assert folder == tmp_path / "x"
    assert weights.stat().st_size < 8 * 1.05 * mask.num_trainable + 300 * len(scores)
    model, start = trained(tiny_bert(**sizes), random_mask(uneven))
    bytes_of = [
        sum(
            (folder / "adapter_model.safetensors").stat().st_size
            for folder in save_as_peft_adapter(
                model, tmp_path / f"y{number}", start=start, max_adapters=number
            )
        )
        for number in (1, 2, 4)
    ]
    assert bytes_of[0] > 1.5 * bytes_of[1] > 1.5 * bytes_of[2] * 0.99


@pytest.mark.slow
def test_without_this_library(tmp_path):
    """Guards against an adapter that needs fish_tuning to be loaded."""
    model, start = trained(tiny_bert(), random_mask(uneven))
    tiny_bert().save_pretrained(tmp_path / "base")
    batch = pad(examples_for(model, 2))
    folders = save_as_peft_adapter(model, tmp_path / "x", start=str(tmp_path / "base"))
    torch.save({k: v for k, v in batch.items() if k != "labels"}, tmp_path / "batch")
    program = f"""
import sys, torch
sys.modules["fish_tuning"] = None
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
folders = {[str(folder) for folder in folders]!r}
model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
for number, folder in enumerate(folders[1:], 1):
    model.load_adapter(folder, adapter_name=str(number))
model.base_model.set_adapter([str(number) for number in range(len(folders))])
print(model.eval()(**torch.load({str(tmp_path / "batch")!r})).logits.tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, logits(model, batch), rtol=0, atol=1e-6)
    assert start


def test_what_supertuning_cannot_hold(tmp_path, caplog):
    """Guards biases, norms and embeddings: stored in full, with a warning, and exact."""
    draw = torch.Generator().manual_seed(0)
    free = "layer.0.output.dense.bias"  # one layer is left for Super-Tuning
    model, start = trained(
        tiny_bert(),
        lambda n, p: torch.rand(p.shape, generator=draw) < (0.0 if free in n else 0.1),
    )
    batch = pad(examples_for(model, 4))
    folders = save_as_peft_adapter(model, tmp_path / "x", start=start)
    assert "trained in part are stored in full" in caplog.text
    found = logits(loaded(tiny_bert(), folders), batch)
    torch.testing.assert_close(found, logits(model, batch), rtol=0, atol=1e-6)


def test_nothing_but_layers_of_another_kind(tmp_path):
    """Guards a model of Conv1D layers, which Super-Tuning does not know."""
    some = torch.Generator().manual_seed(0)
    model, start = trained(
        tiny_gpt2(), lambda n, p: torch.rand(p.shape, generator=some) < 0.1 * (".h." in n)
    )
    with pytest.raises(ValueError, match="no linear layer has changed"):
        save_as_peft_adapter(model, tmp_path / "x", start=start)


def test_refused(tmp_path):
    """Guards against adapters that do not give the masked model."""
    with pytest.raises(ValueError, match="the model has no mask"):
        save_as_peft_adapter(tiny_bert(), tmp_path / "x", start={})
    model, start = trained(tiny_bert(), random_mask(uneven))
    other = {n: t + 1 if "LayerNorm" in n else t for n, t in start.items()}
    with pytest.raises(ValueError, match=r"LayerNorm.* differs from the start outside of the mask"):
        save_as_peft_adapter(model, tmp_path / "x", start=other)
    with pytest.raises(ValueError, match=r"the start has no tensor bert\.embeddings"):
        save_as_peft_adapter(model, tmp_path / "x", start={})
    with pytest.raises(ValueError, match="max_adapters=0: must be at least 1"):
        save_as_peft_adapter(model, tmp_path / "x", start=start, max_adapters=0)
    assert not (tmp_path / "x").exists()


def test_names_that_end_alike(tmp_path):
    """Guards PEFT's matching of modules to save by the end of their names."""
    base = tiny_bert()
    base.pre_classifier = torch.nn.Linear(3, 3)
    model, start = trained(base, random_mask(uneven))
    folders = save_as_peft_adapter(model, tmp_path / "x", start=start)
    fresh = tiny_bert()
    fresh.pre_classifier = torch.nn.Linear(3, 3)
    again = loaded(fresh, folders).merge_and_unload()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=1e-6)
