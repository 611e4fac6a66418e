"""Which parameters become one masked tensor: ties by memory, shapes of values."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fish_tuning import apply_mask, get_mask, remove_mask
from fish_tuning.masked_tensors.tensors import contiguous_stride, fills_its_memory
from fish_tuning.sparse import masked_parameters
from tests.models import tiny_llama
from tests.sparse.small import Mlp
from tests.sparse.twins import random_bits


def tied_llama():
    """PEFT ties the head's adapter to that of the embedding, by views that are transposed."""
    config = LoraConfig(
        r=4,
        target_modules=["embed_tokens", "q_proj"],
        ensure_weight_tying=True,
        init_lora_weights=False,
    )
    return get_peft_model(tiny_llama(tie_word_embeddings=True), config).eval()


def assert_tied(model):
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    pairs = [
        (embedding.lora_embedding_A["default"], head.lora_B["default"].weight),
        (embedding.lora_embedding_B["default"], head.lora_A["default"].weight),
    ]
    for first, second in pairs:
        assert torch.equal(first, second.t())
        assert first.data_ptr() == second.data_ptr()


def test_tied_adapters_stay_tied(tmp_path):
    """Guards against adapters that PEFT ties by views and that a mask trains apart."""
    model = tied_llama()
    shapes = {n: (p.shape, p.stride()) for n, p in model.named_parameters() if p.requires_grad}
    mask = random_bits(model, seed=0)
    apply_mask(model, mask)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in mask}
    found = get_mask(model)
    assert found.keys() == mask.keys()
    head_a = next(name for name in mask if "lm_head.lora_A" in name)
    embedding_b = next(name for name in mask if "lora_embedding_B" in name)
    assert torch.equal(found[head_a], mask[head_a] | mask[embedding_b].t())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    tokens = torch.randint(1, 30, (4, 6), generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        assert_tied(model)
    for name, bits in found.items():
        moved = model.state_dict()[name] != before[name]
        assert not moved[~bits].any() and moved.any(), name
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path).eval()
    assert_tied(loaded)
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected)
    remove_mask(model)
    assert_tied(model)
    assert shapes == {
        n: (p.shape, p.stride()) for n, p in model.named_parameters() if p.requires_grad
    }
    torch.testing.assert_close(model(input_ids=tokens).logits, expected)


def test_a_tied_gradient_is_the_sum_of_both():
    """Guards against one of two uses of a tied adapter that is left out."""
    model, twin = tied_llama(), tied_llama()
    twin.load_state_dict(model.state_dict())
    mask = random_bits(model, seed=0)
    apply_mask(model, mask)
    tokens = torch.randint(1, 30, (4, 6), generator=torch.Generator().manual_seed(0))
    for each in (model, twin):
        each(input_ids=tokens, labels=tokens).loss.backward()
    dense = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    name = next(name for name in mask if "lora_embedding_A" in name)
    other = next(name for name in mask if "lm_head.lora_B" in name)
    expected = (dense[name] + dense[other].t())[get_mask(model)[name]]
    found = dict(model.named_parameters())[name].grad.view(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_shapes_of_values():
    """Guards against biases that optimizers take for matrices, and matrices for biases."""
    model = Mlp()
    every_second = {n: torch.arange(p.numel()) % 2 == 0 for n, p in model.named_parameters()}
    apply_mask(model, {n: every_second[n].view(p.shape) for n, p in model.named_parameters()})
    names = {name: values.dim() for name, values in model.named_parameters()}
    assert names == {
        "first.weight": 2,
        "first.bias": 1,
        "last.weight": 2,
        "last.bias": 1,
    }
    assert [id(v) for v in masked_parameters(model)] == [id(v) for v in model.parameters()]


def test_parameters_keep_their_order():
    """Guards against an optimizer's checkpoint that is loaded into the wrong parameters."""
    model = Mlp()
    names = [name for name, _ in model.named_parameters()]
    apply_mask(model, random_bits(model, seed=0))
    values = list(model.parameters())
    for change in (lambda: model.load_state_dict(model.state_dict()), model.double, model.float):
        change()
        assert [name for name, _ in model.named_parameters()] == names
        assert all(ours is held for ours, held in zip(model.parameters(), values, strict=True))
    assert isinstance(model.first.weight, nn.Parameter)
    model.first.weight = model.first.weight  # as `tie_weights` does
    assert next(model.parameters()) is values[0]


def test_values_that_were_saved_by_name_are_loaded():
    """Guards against scripts that save what is trained, and get nothing back."""
    model, twin = Mlp(), Mlp()
    mask = random_bits(model, seed=0)
    for each in (model, twin):
        apply_mask(each, mask)
    saved = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    twin.load_state_dict(saved)
    for name, tensor in twin.state_dict().items():
        assert (tensor[mask[name]] == 1).all()
        assert torch.equal(tensor[~mask[name]], before[name][~mask[name]])


def test_a_sequential_keeps_its_modules():
    """Guards against a child that `model[-1]` or a loop over the modules finds."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    last = model[-1]
    apply_mask(model, {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()})
    assert len(model) == 3 and model[-1] is last


def test_memory_without_gaps():
    """Guards against views of a tensor that are taken for all of its memory."""
    whole = torch.ones(2, 3, 4)
    for tensor in (whole, whole.permute(2, 0, 1), whole[:1], whole[1:], torch.ones(())):
        assert fills_its_memory(tensor)
    for tensor in (whole[:, :2], whole[..., ::2], torch.ones(3, 1).expand(3, 4)):
        assert not fills_its_memory(tensor)
    assert contiguous_stride(whole.shape) == whole.stride()
