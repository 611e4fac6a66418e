"""Tied weights and tied adapters stay one, in training, in files and without the mask."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fish_tuning import FishMask, apply_mask, get_mask, remove_mask
from tests.models import tiny_gpt2, tiny_llama
from tests.sparse.twins import (
    LORA,
    OWN,
    TIED,
    Twins,
    assert_both_close,
    assert_close,
    base_model,
    copied,
    copyable,
    inputs,
    loss_of,
    output_of,
    random_bits,
    seeded,
    tensor_of,
    tied,
)

SIDES = [("embedding_A", "lora_B"), ("embedding_B", "lora_A")]


def pairs(model):
    """The tied tensors of a model, the head's turned as the embedding's are."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return [
        (
            tensor_of(model, next(n for n in names if f"lora_{ours}" in n)),
            tensor_of(model, next(n for n in names if f"lm_head.{theirs}" in n)),
        )
        for ours, theirs in SIDES
    ]


def assert_tied(model):
    for ours, theirs in pairs(model):
        assert torch.equal(ours, theirs.t())
        assert ours.data_ptr() == theirs.data_ptr()


def steps(twins, n, optimizer=torch.optim.AdamW):
    for i in range(n):
        twins.backward(i)
        twins.step(lambda parameters: optimizer(parameters, 0.02, weight_decay=0.1))
        assert_tied(twins.masked)
        twins.assert_same_state()


def test_tied_adapters_train_as_one():
    """Guards against two halves of a pair that part after a step, or that get half a gradient."""
    twins = Twins.build(TIED)
    steps(twins, 20)
    trainable = {id(p) for p in twins.masked.parameters() if p.requires_grad}
    assert len(trainable) == len(twins.trainable(twins.dense))
    count = sum(p.numel() for p in twins.masked.parameters() if p.requires_grad)
    assert count == sum(int(twins.bits[n].sum()) for n in twins.trainable(twins.dense))


def test_a_load_that_assigns_leaves_adapters_tied():
    """Guards against the refusal of a state dict that is loaded tensor by tensor, not in place."""
    twins = Twins.build(TIED, seed=1)
    state = {key: tensor * 0.9 for key, tensor in twins.dense.state_dict().items()}
    for model in twins.models():
        model.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
    tied(twins.dense)
    assert_tied(twins.masked)
    twins.assert_same_state()
    steps(twins, 2)


def test_tied_adapters_in_files(tmp_path):
    """Guards against files in which a pair differs, or a half of it is missing."""
    twins = Twins.build(TIED)
    steps(twins, 3)
    twins.masked.save_pretrained(tmp_path / "masked")
    twins.dense.save_pretrained(tmp_path / "dense")
    loaded = [
        copyable(PeftModel.from_pretrained(base_model(TIED), tmp_path / kind, is_trainable=True))
        for kind in ("masked", "dense")
    ]
    for model in loaded:
        assert_close(output_of(model.eval(), inputs()), output_of(twins.dense, inputs()), "loaded")
    masked = apply_mask(tied(loaded[0]), FishMask.from_pretrained(tmp_path / "masked"))
    assert get_mask(masked) == get_mask(twins.masked)
    again = Twins(TIED, masked, tied(loaded[1]), twins.bits)
    steps(again, 3)


def test_tied_adapters_without_the_mask():
    """Guards against a pair that parts when its mask is removed."""
    twins = Twins.build(TIED)
    steps(twins, 3)
    remove_mask(twins.masked)
    assert_tied(twins.masked)
    assert [n for n, _ in twins.masked.named_parameters()] == [
        n for n, _ in twins.dense.named_parameters()
    ]
    for first, second in pairs(twins.masked):
        assert isinstance(first, nn.Parameter)
        assert isinstance(second, nn.Parameter)
    twins.assert_same_state()
    twins.assert_same_output(inputs())


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16], ids=str)
def test_tied_adapters_that_are_cast_or_copied(cast):
    """Guards against casts and copies, which plain PEFT parts."""
    twins = Twins.build(TIED)
    steps(twins, 1)
    twins.masked.to(cast).to(torch.float64)
    output_of(twins.masked, inputs())
    assert_tied(twins.masked)
    clone = copied(twins.masked)
    output_of(clone, inputs())
    assert_tied(clone)
    loss_of(clone, inputs()).backward()
    torch.optim.SGD([p for p in clone.parameters() if p.requires_grad], 0.1).step()
    assert_tied(clone)
    assert not torch.equal(pairs(clone)[0][0], pairs(twins.masked)[0][0])


@pytest.mark.parametrize("half", [0, 1])
def test_a_write_to_one_half_of_a_pair(half):
    """Guards against a half that keeps what it was."""
    twins = Twins.build(TIED)
    for model in twins.models():
        with torch.no_grad():
            pairs(model)[0][half].mul_(0.5)
    twins.assert_same_state()
    twins.assert_same_output(inputs())
    assert_tied(twins.masked)


def test_a_mask_that_names_half_of_a_pair():
    """Guards against a pair of which one half is masked and the other trained whole."""
    twins = Twins.build(TIED)
    bits = {name: b for name, b in twins.bits.items() if "lm_head" not in name}
    twins.masked = apply_mask(tied(copied(twins.dense)), bits)
    steps(twins, 3)


# Tied weights of the model itself


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama], ids=lambda b: b.__name__)
def test_tied_weights_train_as_one(build, tmp_path):
    """Guards a model's own embedding and head, which are one parameter."""
    settings = {"tie_word_embeddings": True} if build is tiny_llama else {}
    dense = build(**settings).double()
    bits = random_bits(dense, 2)
    twins = Twins(OWN, apply_mask(copied(dense), bits), dense, bits)
    for i in range(3):
        twins.backward(i)
        twins.step(lambda parameters: torch.optim.AdamW(parameters, 0.02))
    twins.assert_same_state()
    head, embedding = (
        twins.masked.get_output_embeddings().weight,
        twins.masked.get_input_embeddings().weight,
    )
    assert head is embedding
    twins.masked.save_pretrained(tmp_path)
    loaded = build(**settings).from_pretrained(tmp_path).double().eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert_close(output_of(loaded, inputs()), output_of(dense, inputs()), "loaded")
    remove_mask(twins.masked)
    assert twins.masked.get_output_embeddings().weight is twins.masked.get_input_embeddings().weight
    twins.assert_same_state()


# PEFT's other tied adapters

OTHERS = {
    "modules_to_save": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trainable tokens": {"trainable_token_indices": [2, 5], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_tied_embeddings_that_are_saved_or_trained_in_part(kind, tmp_path):
    """Guards PEFT's trained copies of a tied embedding, and of some of its tokens."""
    base = tiny_llama(tie_word_embeddings=True, num_hidden_layers=1).double()
    config = LoraConfig(target_modules=["v_proj"], **OTHERS[kind], **LORA)
    dense = copyable(seeded(lambda: get_peft_model(base, config), 1)).double()
    bits = random_bits(dense, 2)
    twins = Twins(kind, apply_mask(copied(dense), bits), dense, bits)
    for i in range(5):
        twins.backward(i)
        twins.step(lambda parameters: torch.optim.AdamW(parameters, 0.02))
    twins.assert_same_state()
    twins.masked.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(tie_word_embeddings=True, num_hidden_layers=1).double(), tmp_path
    )
    assert_close(output_of(loaded.eval(), inputs()), output_of(dense, inputs()), "loaded")
    merged = [model.merge_and_unload() for model in twins.models()]
    assert_both_close((output_of(model, inputs()) for model in merged), "merged")
    assert tensor_of(merged[0], "lm_head.weight") is tensor_of(
        merged[0], "model.embed_tokens.weight"
    )


@pytest.mark.parametrize("masked", ["some", "none", "all"])
def test_weights_that_were_untied_are_noticed(masked):
    """Guards against tying again what the owner has parted."""
    model = base_model(OWN)
    bits = {name: torch.ones_like(p).bool() for name, p in model.named_parameters()}
    if masked != "all":
        bits["embedding.weight"][:] = False
        bits["embedding.weight"][:3] = masked == "some"
    apply_mask(model, bits)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    if masked == "all":
        assert model(inputs()).requires_grad
        return
    for use in (lambda: model(inputs()), model.state_dict):
        with pytest.raises(RuntimeError, match=r"no longer fits.*were tied.*remove_mask"):
            use()
    remove_mask(model)
    assert model.head.weight is not model.embedding.weight
