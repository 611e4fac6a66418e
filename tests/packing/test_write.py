"""pack: what becomes of each tensor, sizes, and folders that cannot be packed."""

import shutil

import pytest
import safetensors.numpy
import safetensors.torch
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from fish_tuning import (
    FishMask,
    apply_mask,
    get_mask,
    pack,
    unpack,
)
from fish_tuning.packing import write
from tests.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.packing.saved_folders import (
    PACKED,
    WEIGHTS,
    base_folder,
    contents,
    load_base,
    new_adapter,
    random_mask,
    trained,
    write_folder,
)
from tests.sparse.small import LORA, Mlp
from tests.sparse.small import random_mask as mlp_mask


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({}, []),
        ({"init_lora_weights": "gaussian"}, []),
        ({"target_modules": "all-linear", "lora_bias": True}, []),
        ({"target_modules": ["word_embeddings", "query"]}, []),
        ({"use_dora": True}, ["lora_magnitude_vector"]),
    ],
    ids=["lora", "gaussian", "all-linear", "embedding", "dora"],
)
def test_adapter_from_its_seed(base, tmp_path, caplog, settings, stored):
    """Guards the way back to every byte, and a start that is drawn in another order than PEFT's.

    The adapter went through a Trainer; packing neither touches the caller's random state nor
    needs anything but the base model's config.
    """
    folder = trained(new_adapter(load_base(base), **settings), tmp_path / "adapter")
    (base / "model.safetensors").unlink()
    state = torch.get_rng_state()
    report = pack(folder, tmp_path / "packed", seed=3)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(tmp_path / "again") == {name: contents(folder)[name] for name in PACKED}
    assert report.left_out == ("training_args.bin",)
    assert report.entries["seed"] > 0 and report.entries["start"] == 0
    assert report.entries["selected"] == FishMask.from_pretrained(folder).num_trainable
    kept = [record.getMessage() for record in caplog.records if record.name == write.__name__]
    assert len(kept) == len(stored) and all(map(str.__contains__, kept, stored))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_of_a_model_in_half_precision(base, tmp_path, dtype):
    """Guards PEFT's rounding to the base model's type, and adapters that are kept in it."""
    model = new_adapter(load_base(base, dtype=dtype))
    rounded = model.base_model.bert.encoder.layer[0].attention.self.query.lora_A.default.weight
    assert rounded.dtype == torch.float32 and torch.equal(rounded, rounded.to(dtype).float())
    folder = trained(model.float(), tmp_path / "float")
    assert pack(folder, tmp_path / "packed", seed=3).entries["stored"] == 0
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again").items() <= contents(folder).items()

    half = new_adapter(load_base(base)).to(dtype)
    apply_mask(half, random_mask(half))
    half.save_pretrained(tmp_path / "half")
    assert pack(tmp_path / "half", tmp_path / "packed_2", seed=3).entries["stored"] == 0
    unpack(tmp_path / "packed_2", tmp_path / "again_2")
    assert contents(tmp_path / "again_2") == contents(tmp_path / "half")


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (tiny_llama, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")),
        (tiny_gpt2, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)),
        (tiny_t5, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wi"])),
        (tiny_llama, IA3Config(task_type="CAUSAL_LM", feedforward_modules=["down_proj"])),
    ],
    ids=["llama", "gpt2 without a task", "t5", "ia3"],
)
def test_other_models_and_methods(tmp_path, build, config):
    """Guards the model class that is found for an adapter's config, and names of other methods."""
    path = base_folder(tmp_path / "base", build())
    if config.peft_type == "IA3":
        config.target_modules = ["k_proj", "down_proj"]
    model = new_adapter(type(build()).from_pretrained(path), config=config)
    apply_mask(model, random_mask(model))
    model.save_pretrained(tmp_path / "adapter")
    assert pack(tmp_path / "adapter", tmp_path / "packed", seed=3).entries["stored"] == 0
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "adapter")


def test_without_a_start_all_is_stored(adapter, tmp_path, caplog):
    """Guards against frozen entries that are lost, or kept without a word, where nothing gives
    them."""
    for options in ({}, {"seed": 4}):
        caplog.clear()
        report = pack(adapter, tmp_path / "packed", **options)
        assert report.entries["stored"] > 0 and report.entries["seed"] == 0
        assert report.sizes["stored"] == 4 * report.entries["stored"]
        [message] = caplog.messages
        assert f"{report.sizes['stored']:,} bytes" in message and "lora_A" in message
        # No base model is needed.
        unpack(tmp_path / "packed", tmp_path / "again", base_model="no such model")
        assert contents(tmp_path / "again").items() <= contents(adapter).items()
        (tmp_path / "packed").unlink()
        shutil.rmtree(tmp_path / "again")


def test_size(tmp_path):
    """Guards the promise: a quarter of a rank-32 adapter, MiniLM's shapes, in at most 30%."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    base = tiny_bert(num_labels=2, num_attention_heads=12, **sizes)
    model = new_adapter(base, r=32, target_modules=["query", "key", "value"])
    apply_mask(model, random_mask(model, 0.25))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    report = pack(tmp_path / "adapter", tmp_path / "packed", seed=3, base_model=base)
    assert report.weights_bytes == (tmp_path / "adapter" / WEIGHTS).stat().st_size
    assert report.packed_bytes == (tmp_path / "packed").stat().st_size
    assert report.weights_bytes >= 4 * 2 * 18 * 32 * 384
    assert report.packed_bytes <= 0.30 * report.weights_bytes
    assert sum(report.entries.values()) == 2 * 18 * 32 * 384 + 2 * 384 + 2
    assert report.sizes["selected"] == 4 * report.entries["selected"]


@pytest.mark.parametrize("text", ["[1]", "{", "null", "[" * 10**5])
def test_damaged_adapter_config(adapter, tmp_path, text):
    """Guards against an AttributeError or a RecursionError from deep inside."""
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json is not a JSON object"):
        pack(adapter, tmp_path / "packed", seed=3)


def test_folders_that_cannot_be_packed(small, tmp_path):
    """Guards against a late or unclear error over what is in the folder, and files left behind."""
    tensors = safetensors.torch.load_file(small / "saved" / "model.safetensors")
    mask = FishMask.from_pretrained(small / "saved")

    def refused(error, match, folder, **options):
        with pytest.raises(error, match=match):
            pack(folder, tmp_path / "packed", **options)
        assert not (tmp_path / "packed").exists()

    refused(FileNotFoundError, "none is not a folder", tmp_path / "none")
    refused(FileNotFoundError, "holds neither adapter_model.safetensors nor model", tmp_path)
    refused(ValueError, "saved holds no adapter_config.json: a seed is", small / "saved", seed=1)
    refused(FileNotFoundError, "holds no safetensors file", small / "saved", start=tmp_path)

    without = write_folder(tmp_path / "without", tensors, mask)
    (without / "fish_mask.json").unlink()
    refused(FileNotFoundError, "holds no complete FISH mask", without)

    other = FishMask({name: torch.ones(2) for name in mask})
    refused(ValueError, "has shape .* other weights", write_folder(tmp_path / "o", tensors, other))

    none = FishMask({"of.another.fish.weight": torch.ones(2)})
    folder = write_folder(tmp_path / "n", tensors, none)
    refused(ValueError, "names no tensor of the weights .* of.another.fish.weight", folder)

    complex_ = {"m.whole": torch.ones(3, dtype=torch.complex64)}
    folder = write_folder(tmp_path / "complex", complex_, mask)
    refused(ValueError, "cannot be packed: m.whole is of type C64", folder)

    cut = write_folder(tmp_path / "cut", tensors, mask)
    content = (cut / "model.safetensors").read_bytes()
    for size in (len(content) - 1, 100, 3, 0):
        (cut / "model.safetensors").write_bytes(content[:size])
        refused(ValueError, "model.safetensors cannot be packed: it ", cut)
    (cut / "model.safetensors").write_bytes(content)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.safetensors").write_bytes(content[:-1])
    refused(ValueError, "a.safetensors is not a complete", cut, start=tmp_path / "bad")


@pytest.mark.parametrize("name", ["mine", "0"])
def test_an_adapter_of_another_name(tmp_path, name):
    """Guards against masks whose tensors are found only under the name "default"."""
    model = get_peft_model(Mlp(), LoraConfig(**LORA), adapter_name=name)
    apply_mask(model, mlp_mask(model, name)).save_pretrained(tmp_path / "saved")
    report = pack(tmp_path / "saved" / name, tmp_path / "packed.fish")
    unpack(tmp_path / "packed.fish", tmp_path / "unpacked")
    assert contents(tmp_path / "unpacked").items() <= contents(tmp_path / "saved" / name).items()
    assert report.entries["selected"] == sum(int(b.sum()) for b in get_mask(model).values())


def test_a_mask_of_several_adapters(tmp_path):
    """Guards against weights that are packed with another adapter's mask."""
    model = get_peft_model(Mlp(), LoraConfig(**LORA), adapter_name="a")
    apply_mask(model, mlp_mask(model, "a"))
    model.add_adapter("b", LoraConfig(**LORA))
    model.set_adapter("b")
    apply_mask(model, mlp_mask(model, "b"))
    model.save_pretrained(tmp_path)
    get_mask(model).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"several adapters \(a, b\): save the mask of the one"):
        pack(tmp_path / "a", tmp_path / "packed.fish")
