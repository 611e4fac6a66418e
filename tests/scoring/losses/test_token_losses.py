"""Cross-entropy of tokens in chunks: values, gradients, and what is kept for the backward pass."""

import pytest
import torch
import torch.nn.functional as F

from fish_tuning.scoring.losses import token_losses as module
from fish_tuning.scoring.losses.token_losses import token_losses

IGNORED = -100
N, CLASSES = 23, 7


@pytest.fixture(params=[5, 4 * CLASSES, 2**21], ids=["one row", "four rows", "a quarter"])
def _chunks(request, monkeypatch):
    """Chunks smaller than a row, of four rows, and larger than all rows, which are divided."""
    monkeypatch.setattr(module, "CHUNK_ENTRIES", request.param)


def inputs(dtype, labeled=0.6):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(N, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (N,), generator=generator)
    labels = labels.masked_fill(torch.rand(N, generator=generator) > labeled, IGNORED)
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), labels, weights


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("labeled", [0.0, 0.6, 1.0])
def test_losses_and_gradients_are_torchs(labeled):
    """Guards each chunk's rows, the ignored rows, and a gradient that differs between tokens."""
    logits, labels, weights = inputs(torch.float64, labeled)
    losses = token_losses(logits, labels, IGNORED)
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(losses, expected)
    ours, torchs = (torch.autograd.grad((x * weights).sum(), logits) for x in (losses, expected))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_converted(dtype):
    """Guards against losses computed in half precision; the gradient has the logits' type."""
    logits, labels, weights = inputs(dtype)
    losses = token_losses(logits, labels, IGNORED)
    assert losses.dtype == torch.float32
    expected = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(losses, expected)
    ours, torchs = (torch.autograd.grad((x * weights).sum(), logits) for x in (losses, expected))
    assert ours[0].dtype == dtype
    torch.testing.assert_close(ours, torchs)


def test_only_the_logits_are_kept():
    """Guards the memory of a large vocabulary: no log-softmax, no copy in float32."""
    kept = []
    logits, labels, _ = inputs(torch.bfloat16)

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_losses(logits, labels, IGNORED)
    assert [t.data_ptr() for t in kept if t.numel() > N] == [logits.data_ptr()]


def test_small_logits_are_divided_too():
    """Guards the memory of small models: copies of all logits would be their largest tensors."""
    labels = inputs(torch.float32, labeled=1.0)[1]
    chunks = module.labeled_chunks(labels, CLASSES, IGNORED)
    assert torch.cat(chunks).equal(torch.arange(N))
    assert max(map(len, chunks)) <= N / 4


def test_two_backward_passes():
    """Guards against a backward pass that overwrites the logits: several draws share them."""
    logits, labels, weights = inputs(torch.float64)
    loss = (token_losses(logits, labels, IGNORED) * weights).sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second)
