"""pack, unpack and load_packed: sizes, exact bits, and files that are damaged or made to harm."""

import hashlib
import json
import os
import shutil
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainingArguments

from fish_tuning import (
    FishMask,
    FishTuningTrainer,
    apply_mask,
    create_mask_from_fisher,
    load_packed,
    pack,
    random_scores,
    unpack,
)
from fish_tuning.packing import packed_file, read, write
from fish_tuning.packing.packed_file import FORMAT
from tests.models import examples_for, pad, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

WEIGHTS = "adapter_model.safetensors"
PACKED = ("README.md", "adapter_config.json", WEIGHTS, "fish_mask.json", "fish_mask.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def base_folder(folder: Path, model=None) -> Path:
    (model if model is not None else tiny_bert(num_hidden_layers=3)).save_pretrained(folder)
    return folder


def new_adapter(base, seed=3, config=None, **settings):
    settings = {"task_type": "SEQ_CLS", "r": 8, "target_modules": ["query", "value"], **settings}
    torch.manual_seed(seed)
    return get_peft_model(base, config or LoraConfig(**settings))


def trained(model, folder: Path, density=0.25, exclude=("modules_to_save",)) -> Path:
    """Trains a random choice of entries for three steps, with weight decay; saves into `folder`."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mask = create_mask_from_fisher(random_scores(trainable, 0), density, exclude)
    args = TrainingArguments(
        str(folder.parent / "checkpoints"),
        max_steps=3,
        learning_rate=0.02,
        weight_decay=0.1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = FishTuningTrainer(
        model, args, train_dataset=examples_for(model, 12), data_collator=pad, mask=mask
    )
    trainer.train()
    trainer.save_model(str(folder))
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return base_folder(tmp_path / "base")


def load_base(folder: Path, **kwargs):
    return AutoModelForSequenceClassification.from_pretrained(folder, **kwargs)


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return trained(new_adapter(load_base(base)), tmp_path / "adapter")


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


def random_mask(model, density=0.3) -> FishMask:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return create_mask_from_fisher(random_scores(trainable, 1), density, ["modules_to_save"])


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
    """Guards frozen entries that are lost, or kept without a word, where nothing gives them."""
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


def test_adapter_from_its_start(base, adapter, tmp_path):
    """Guards the start that is named: needed again, and told from another one."""
    new_adapter(load_base(base), seed=3).save_pretrained(tmp_path / "start")
    new_adapter(load_base(base), seed=4).save_pretrained(tmp_path / "other")
    file = tmp_path / "packed"
    report = pack(adapter, file, start=tmp_path / "start")
    assert report.entries["start"] > 0 and report.entries["stored"] == 0
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"packed was packed with a start .*--start"):
        unpack(file, tmp_path / "again")
    with pytest.raises(ValueError, match=r"the start that was named.*sha256"):
        unpack(file, tmp_path / "again", start=tmp_path / "other")
    with pytest.raises(ValueError, match=r"the start that was named.*lora_A.* is not in it"):
        unpack(file, tmp_path / "again", start=base)
    with pytest.raises(FileNotFoundError, match="holds no safetensors file"):
        unpack(file, tmp_path / "again", start=tmp_path)
    assert listing(tmp_path) == before
    unpack(file, tmp_path / "again", start=tmp_path / "start")
    assert contents(tmp_path / "again").items() <= contents(adapter).items()


def test_load_packed_adapter(base, adapter, tmp_path):
    """Guards an adapter that loads as other numbers than its folder, or without its options."""
    pack(adapter, tmp_path / "packed", seed=3)
    models = load_base(base), load_base(base)
    shutil.rmtree(base)  # The model that is passed is enough.
    loaded = load_packed(models[0], tmp_path / "packed", is_trainable=True)
    expected = PeftModel.from_pretrained(models[1], adapter, is_trainable=True)
    assert type(loaded) is type(expected)
    a, b = dict(loaded.named_parameters()), dict(expected.named_parameters())
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    assert all(a[name].requires_grad == b[name].requires_grad for name in b)
    batch = pad(examples_for(expected, 3))
    assert torch.equal(loaded.eval()(**batch).logits, expected.eval()(**batch).logits)
    apply_mask(loaded, FishMask.from_pretrained(adapter))


def fine_tuned(base: Path, folder: Path, dtype=torch.float32) -> Path:
    """A model of which 5% of the linear weights, and the head, were trained."""
    model = load_base(base, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "classifier" in name or (parameter.dim() == 2 and "layer" in name)
    return trained(model, folder, density=0.05, exclude=["classifier"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_the_model_itself(base, tmp_path, dtype):
    """Guards FISH Mask: the frozen part is the checkpoint, whose names lack the head's prefix."""
    folder = fine_tuned(base, tmp_path / "model", dtype)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    encoder = {name.removeprefix("bert."): t for name, t in tensors.items() if "bert." in name}
    safetensors.torch.save_file(encoder, checkpoint / "model.safetensors")

    report = pack(folder, tmp_path / "packed", start=checkpoint)
    assert report.entries["stored"] == 0
    unpack(tmp_path / "packed", tmp_path / "again", start=checkpoint)
    assert "config.json" in contents(tmp_path / "again")
    assert contents(tmp_path / "again").items() <= contents(folder).items()

    model = load_base(base, dtype=dtype)
    assert load_packed(model, tmp_path / "packed") is model
    expected = load_base(folder, dtype=dtype).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def test_tied_weights(tmp_path):
    """Guards a tensor that files hold under one of its names, taken for one that is missing."""
    torch.manual_seed(0)
    model, before = tiny_gpt2(), tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    apply_mask(model, random_mask(model, 0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    report = pack(tmp_path / "model", tmp_path / "packed", start=before.state_dict())
    assert report.entries["stored"] == 0
    load_packed(before, tmp_path / "packed")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.state_dict().items())


def test_load_packed_onto_another_model(base, tmp_path):
    """Guards a model that is half overwritten before the mistake is noticed."""
    folder = fine_tuned(base, tmp_path / "model")
    pack(folder, tmp_path / "packed", start=base)
    bigger = tiny_bert(num_hidden_layers=4)
    before = {name: tensor.clone() for name, tensor in bigger.state_dict().items()}
    for other, start, match in (
        (bigger, base, r"weights of another model: \d+ tensors.*layer\.3"),
        (tiny_bert(num_hidden_layers=2), base, "weights of another model: .*layer.2"),
        (tiny_bert(num_hidden_layers=2), None, r"the start that was named.*layer\.2.* not in it"),
        (tiny_bert(num_hidden_layers=3, seed=1), None, "the start that was named.*sha256"),
    ):
        with pytest.raises(ValueError, match=match):
            load_packed(other, tmp_path / "packed", start=start)
    assert all(torch.equal(t, before[name]) for name, t in bigger.state_dict().items())
    with pytest.raises(TypeError, match="is_trainable: only an adapter"):
        load_packed(load_base(base), tmp_path / "packed", is_trainable=True)


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


# Folders made of any numbers, without a model.


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = {
    torch.float32: [0x00000000, 0x80000000, 0x7FC00001, 0xFFC00000, 0x7F800001, 0x7F800000],
    torch.bfloat16: [0x0000, 0x8000, 0x7FC1, 0xFFC0, 0x7F81],
    torch.float16: [0x0000, 0x8000, 0x7E01, 0xFE00, 0x7C01],
}


def any_bits(rng, shape, dtype) -> torch.Tensor:
    """Random bits, and many of the numbers that arithmetic does not keep."""
    word = np.dtype(f"<u{dtype.itemsize}")
    bits = rng.integers(0, 2 ** (8 * dtype.itemsize), shape, dtype=word)
    special = rng.choice(np.array(SPECIAL[dtype], word), shape)
    bits = np.where(rng.random(shape) < 0.5, bits, special).astype(word)
    flat = torch.from_numpy(bits.reshape(-1).view(f"i{dtype.itemsize}"))
    return flat.view(dtype).reshape(shape)


def write_folder(folder: Path, tensors, mask: FishMask) -> Path:
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes(b'{"any": "bytes \xff\x00\xe9"}\r\n')
    mask.save_pretrained(folder)
    return folder


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 7), max_size=3),
            st.sampled_from(DTYPES),
            st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]),
            st.sampled_from(["constant", "start", "rounded", "nothing"]),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_numbers(tmp_path_factory, tensors, seed):
    """Guards shapes, types, densities and bit patterns that come back as something else."""
    folder = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(seed)
    saved, masks, start = {}, {"not in the file": torch.ones(3)}, {}
    for number, (shape, dtype, density, frozen) in enumerate(tensors):
        name = f"model.layer.{number}"
        tensor = any_bits(rng, shape, dtype)
        selected = torch.from_numpy(np.asarray(rng.random(shape) < (density or 0.0)))
        if density is not None or number == 0:
            masks[name] = selected
        before = tensor
        if frozen == "constant":
            before = any_bits(rng, (), dtype).expand(tensor.shape)
        elif frozen in ("start", "rounded"):
            before = any_bits(rng, shape, dtype)
            start[name if number % 2 else f"layer.{number}"] = (
                before.float() if frozen == "rounded" else before
            )
        saved[name] = torch.where(selected, tensor, before).contiguous()
    write_folder(folder / "saved", saved, FishMask(masks))
    report = pack(folder / "saved", folder / "packed", start=start)
    unpack(folder / "packed", folder / "again", start=start)
    assert contents(folder / "again") == contents(folder / "saved")
    assert sum(report.entries.values()) == sum(tensor.numel() for tensor in saved.values())
    assert report.entries["selected"] == sum(
        int(bits.sum()) for name, bits in masks.items() if name in saved
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A packed file in which every way to keep frozen entries is used, but for the seed."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    shapes = {"m.constant": (6, 5), "m.start": (7, 3), "m.stored": (4, 4), "m.whole": (3,)}
    tensors = {name: any_bits(rng, shape, torch.float32) for name, shape in shapes.items()}
    masks = {name: torch.from_numpy(rng.random(shape) < 0.4) for name, shape in shapes.items()}
    masks["m.whole"] = torch.ones(3)
    tensors["m.constant"] = tensors["m.constant"].where(masks["m.constant"], torch.tensor(-0.0))
    tensors["m.other"] = any_bits(rng, (5,), torch.bfloat16)
    write_folder(folder / "saved", tensors, FishMask(masks))
    start = {"start": tensors["m.start"].where(~masks["m.start"], torch.tensor(1.0))}
    (folder / "start").mkdir()
    safetensors.torch.save_file(start, folder / "start" / "model.safetensors")
    report = pack(folder / "saved", folder / "packed", start=folder / "start")
    assert all(report.entries[kind] for kind in ("selected", "constant", "start", "stored"))
    return folder


def parts_of(file: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(file)


def signed(parts, version=1) -> bytes:
    """A packed file of these parts, as anyone can write one."""
    sha256 = hashlib.sha256()
    for name in ("record", "values", "stored", "bits"):
        sha256.update(f"{name}:{len(parts[name])}:".encode() + parts[name].tobytes())
    about = json.dumps({"format_version": version, "sha256": sha256.hexdigest()})
    return safetensors.numpy.save(parts, {FORMAT: about})


def deflated(content: bytes) -> np.ndarray:
    return np.frombuffer(zlib.compress(content), np.uint8)


def forged(small: Path, file: Path, edit) -> Path:
    """The small file with its record edited, and a sha256 that fits."""
    parts = parts_of(small / "packed")
    record = json.loads(zlib.decompress(parts["record"].tobytes()))
    edit(record, parts)
    parts["record"] = deflated(json.dumps(record).encode())
    file.write_bytes(signed(parts))
    return file


def test_format_as_documented(small, tmp_path):
    """Guards what other programs may read: the four parts and their order."""
    file = tmp_path / "packed"
    parts = parts_of(small / "packed")
    file.write_bytes(signed(parts))
    unpack(file, tmp_path / "again", start=small / "start")
    assert contents(tmp_path / "again") == contents(small / "saved")

    with safetensors.safe_open(small / "saved" / "model.safetensors", "pt") as saved:
        in_order = [(name, saved.get_tensor(name)) for name in saved.offset_keys()]
    mask = FishMask.from_pretrained(small / "saved")
    values = [tensor[mask[name]].numpy() for name, tensor in in_order if name in mask]
    assert parts["values"].tobytes() == b"".join(value.tobytes() for value in values)
    kept = [
        dict(in_order)["m.stored"][~mask["m.stored"]],
        dict(in_order)["m.other"].view(torch.int16),
    ]
    if list(dict(in_order)).index("m.other") < list(dict(in_order)).index("m.stored"):
        kept.reverse()
    assert parts["stored"].tobytes() == b"".join(tensor.numpy().tobytes() for tensor in kept)
    bits = parts_of(small / "saved" / "fish_mask.safetensors")["bits"]
    assert zlib.decompress(parts["bits"].tobytes()) == bits.tobytes()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files(small, tmp_path, data):
    """Guards against any other error, or any other folder, from bytes flipped, cut or added."""
    content = bytearray((small / "packed").read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "add"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content += data.draw(st.binary(min_size=1, max_size=9))
    file, folder = tmp_path / "packed", tmp_path / "again"
    file.write_bytes(content)
    try:
        unpack(file, folder, start=small / "start")
    except ValueError as error:
        assert str(file) in str(error)
        assert listing(tmp_path) == [file]
    else:
        assert contents(folder) == contents(small / "saved")
        shutil.rmtree(folder)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_records_made_to_harm(small, tmp_path, data):
    """Guards against a record that is damaged, or wrong on purpose, under a sha256 that fits."""
    parts = parts_of(small / "packed")
    record = bytearray(zlib.decompress(parts["record"].tobytes()))
    for _ in range(data.draw(st.integers(1, 2))):
        position = data.draw(st.integers(0, len(record) - 1))
        record[position] = data.draw(st.sampled_from(b'0129-.,:{}[]"\\n\x00az/'))
    parts["record"] = deflated(bytes(record))
    file, folder = tmp_path / "packed", tmp_path / "again"
    file.write_bytes(signed(parts))
    try:
        unpack(file, folder, start=small / "start")
    except ValueError as error:
        assert str(file) in str(error)
        assert listing(tmp_path) == [file]
    else:
        name = "model.safetensors"
        assert (folder / name).read_bytes() == (small / "saved" / name).read_bytes()
        shutil.rmtree(folder)


def set_plan(**changes):
    def edit(record, parts):
        plans = [plan for plan in record["tensors"] if plan.get("mask") == "m.constant"]
        plans[0] |= changes

    return edit


def set_header(name: str, shape, size: int, gap: int = 0):
    """Claims one more tensor at the end of the weights."""

    def edit(record, parts):
        header = json.loads(record["weights_header"])
        last = max(entry["data_offsets"][1] for key, entry in header.items() if "_" not in key)
        offsets = [last + gap, last + gap + size]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        record["weights_header"] = json.dumps(header)
        record["tensors"].append({"mask": None, "frozen": "constant", "fill": 0, "rounded": None})

    return edit


def set_text(name: str):
    def edit(record, parts):
        record["texts"][name] = "harm"

    return edit


def empty(part: str):
    def edit(record, parts):
        parts[part] = parts[part][:-4]

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (set_text("../harm"), r"record is wrong at texts\.\.\./harm"),
        (set_text("/tmp/harm"), r"record is wrong at texts"),
        (set_text("training_args.bin"), r"record is wrong at texts"),
        (lambda record, parts: record.update(weights_name="../x"), "wrong at weights_name"),
        (lambda record, parts: record.update(more=1), "wrong at more"),
        (lambda record, parts: record["tensors"].pop(), "does not list the tensors"),
        (lambda record, parts: record["texts"].pop("fish_mask.json"), "do not fit together"),
        (lambda record, parts: record.update(weights_sha256="0"), "sha256"),
        (set_header("z", [2**40], 2**42), "z cannot be filled with a constant"),
        (set_header("z", [2**70, 0], 0), "z has 0 frozen entries from constant"),
        (set_header("z", [3], 8), "offsets of z in its header are wrong"),
        (set_header("z", [3], 12, gap=4), "offsets of z in its header are wrong"),
        (set_header("z", [3], 12, gap=-4), "offsets of z in its header are wrong"),
        (set_plan(fill=2**32), "m.constant cannot be filled"),
        (set_plan(fill=-1), r"record is wrong at tensors\.\d+\.fill"),
        (set_plan(frozen="stored"), r"a part has \d+ bytes instead of \d+"),
        (set_plan(frozen=None), r"m.constant has \d+ frozen entries from None"),
        (set_plan(frozen="pickle"), r"record is wrong at tensors\.\d+\.frozen"),
        (set_plan(frozen="seed"), r"lacks a seed or adapter_config\.json"),
        (set_plan(mask="m.start"), "m.constant has shape"),
        (set_plan(mask="none"), "m.constant has shape"),
        (empty("values"), r"a part has \d+ bytes instead of \d+"),
        (empty("stored"), r"a part has \d+ bytes instead of \d+"),
        (empty("bits"), "does not inflate to at most"),
    ],
)
def test_forged_files(small, tmp_path, edit, match):
    """Guards each check behind the sha256, which anyone can compute; nothing is written."""
    file = forged(small, tmp_path / "packed", edit)
    with pytest.raises(ValueError, match=match) as caught:
        unpack(file, tmp_path / "again", start=small / "start")
    assert str(file) in str(caught.value)
    assert listing(tmp_path) == [file]


@pytest.mark.parametrize("part", ["record", "bits"])
def test_parts_that_inflate_without_end(small, tmp_path, monkeypatch, part):
    """Guards against memory that a few bytes ask for."""
    monkeypatch.setattr(packed_file, "RECORD_LIMIT", 2**20)
    parts = parts_of(small / "packed")
    parts[part] = deflated(bytes(2**26))
    (tmp_path / "packed").write_bytes(signed(parts))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"packed cannot be used: .*does not inflate to at most"):
        unpack(tmp_path / "packed", tmp_path / "again")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.parametrize("part", ["record", "values", "stored", "bits"])
def test_damage_is_told_from_another_start(small, tmp_path, part):
    """Guards advice to look for another start where the file is at fault."""
    content = (small / "packed").read_bytes()
    data = parts_of(small / "packed")[part].tobytes()
    position = content.index(data) + len(data) // 2
    flipped = content[position] ^ 0x10
    file = tmp_path / "packed"
    file.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
    with pytest.raises(ValueError, match=r"packed cannot be used: .* the sha256 that it records"):
        unpack(file, tmp_path / "again", start=small / "start")


def test_files_of_other_kinds(small, tmp_path):
    """Guards files that are sound and something else, of a later version, or not there."""
    file, folder = tmp_path / "packed", tmp_path / "again"
    for content in (
        (small / "saved" / "model.safetensors").read_bytes(),
        (small / "saved" / "fish_mask.safetensors").read_bytes(),
        safetensors.numpy.save({"a": np.zeros(3)}, {FORMAT: "[1]"}),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="packed cannot be used: it is not a file that fish"):
            unpack(file, folder)
    for content in (b"", b"\x80\x02pickle", b"PK\x03\x04" * 9):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"packed cannot be used: it is not a complete|header"):
            unpack(file, folder)
    for version in (2, None, "1"):
        file.write_bytes(signed(parts_of(small / "packed"), version))
        with pytest.raises(ValueError, match=f"packed has format_version {version!r}"):
            unpack(file, folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="packed does not exist: name a file"):
        unpack(file, folder)
    assert listing(tmp_path) == []


def test_a_seed_that_draws_other_numbers(adapter, base, tmp_path, monkeypatch):
    """Guards another torch or PEFT, or another base model, that rebuilds another adapter."""
    file = tmp_path / "packed"
    pack(adapter, file, seed=3)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"seed 3 draws: .*torch \d.*here torch.*is not in it"):
        unpack(file, tmp_path / "again", base_model=tiny_bert(num_hidden_layers=2))
    wide = tiny_bert(num_hidden_layers=3, hidden_size=16)
    with pytest.raises(ValueError, match=r"lora_A.* of shape \(8, 12\) is not in it"):
        unpack(file, tmp_path / "again", base_model=wide)
    with pytest.raises(ValueError, match=r"base model 'nowhere/at all' .*--base"):
        unpack(file, tmp_path / "again", base_model="nowhere/at all")
    with pytest.raises(ValueError, match="not for a Linear"):
        unpack(file, tmp_path / "again", base_model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot be built on its base model"):
        unpack(file, tmp_path / "again", base_model=tiny_gpt2())
    draw = read.draw_start

    def other(*arguments):
        return {name: tensor + 2**-20 for name, tensor in draw(*arguments).items()}

    monkeypatch.setattr(read, "draw_start", other)
    with pytest.raises(ValueError, match=r"seed 3 draws: .* do not have the sha256 recorded"):
        unpack(file, tmp_path / "again")
    assert listing(tmp_path) == before


def test_a_base_model_with_code_of_its_own(adapter, tmp_path):
    """Guards against running what a name in a packed file leads to."""
    pack(adapter, tmp_path / "packed", seed=3)
    base = tmp_path / "harm"
    base.mkdir()
    settings = {"model_type": "harm", "auto_map": {"AutoConfig": "code.Harm"}}
    (base / "config.json").write_text(json.dumps(settings))
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"cannot be loaded .*custom code"):
        unpack(tmp_path / "packed", tmp_path / "again", base_model=base)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "again").exists()


@pytest.mark.parametrize("text", ["[1]", "{", "null", "[" * 10**5])
def test_damaged_adapter_config(adapter, tmp_path, text):
    """Guards an AttributeError or a RecursionError from deep inside."""
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json is not a JSON object"):
        pack(adapter, tmp_path / "packed", seed=3)


def test_existing_targets(small, tmp_path):
    """Guards files of the user's that would be overwritten or mixed with others."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not an empty folder"):
            unpack(small / "packed", tmp_path / name, start=small / "start")
    with pytest.raises(FileExistsError, match="file exists: name a new file"):
        pack(small / "saved", tmp_path / "file", start=small / "start")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    unpack(small / "packed", tmp_path / "empty", start=small / "start")
    assert contents(tmp_path / "empty") == contents(small / "saved")


def test_a_failed_unpack_leaves_nothing(small, tmp_path, monkeypatch):
    """Guards half of a folder that looks like an adapter."""

    def fail(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        unpack(small / "packed", tmp_path / "again", start=small / "start")
    assert listing(tmp_path) == []


def test_folders_that_cannot_be_packed(small, tmp_path):
    """Guards a late or unclear error over what is in the folder, and files left behind."""
    tensors = safetensors.torch.load_file(small / "saved" / "model.safetensors")
    mask = FishMask.from_pretrained(small / "saved")

    def refused(error, match, folder, **options):
        with pytest.raises(error, match=match):
            pack(folder, tmp_path / "packed", **options)
        assert not (tmp_path / "packed").exists()

    refused(FileNotFoundError, "none is no folder", tmp_path / "none")
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
