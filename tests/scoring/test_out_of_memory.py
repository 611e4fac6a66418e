"""Scoring when memory runs out: batches are divided, and the scores stay the same."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fish_tuning import calculate_fisher_information
from fish_tuning.scoring import scorers
from tests.models import assert_scores_close, batches_of, examples_for, tiny_bert, with_lora

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"


class Fault(TorchDispatchMode):
    """Fails at an operation, counted from where it is entered first."""

    def __init__(self, at, error=ALLOCATOR):
        super().__init__()
        self.left, self.error = at, error

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise self.error if isinstance(self.error, Exception) else RuntimeError(self.error)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def attempts(monkeypatch):
    """Runs every attempt of a scorer in what `attempts.of(numbers)` returns; None: as it is."""

    class Attempts:
        sizes: list[int] = []  # noqa: RUF012
        of = staticmethod(lambda numbers: None)

    def watched(genuine):
        def add(self, batch, numbers, progress):
            found.sizes.append(len(numbers))
            mode = found.of(numbers)
            if mode is None:
                return genuine(self, batch, numbers, progress)
            with mode:
                return genuine(self, batch, numbers, progress)

        return add

    found = Attempts()
    found.sizes = []
    for scorer in (scorers.OnePass, scorers.OneByOne):
        monkeypatch.setattr(scorer, "add", watched(scorer.add))
    return found


def head_and_embeddings(**config):
    model = with_lora(tiny_bert(**config), init_lora_weights=False, lora_dropout=0.0)
    for name, parameter in model.named_parameters():
        if "word_embeddings" in name or "LayerNorm" in name:
            parameter.requires_grad_()
    return model.double()


def recomputed():
    lora = with_lora(tiny_bert(), init_lora_weights=False, lora_dropout=0.0, use_dora=True)
    return lora.double()


def one_by_one():
    """A loss of its own, which is known for one example at a time only."""

    def double(module, args, outputs):
        if outputs.loss is not None:
            outputs.loss = 2 * outputs.loss

    model = with_lora(tiny_bert(), init_lora_weights=False, lora_dropout=0.0).double()
    model.get_base_model().register_forward_hook(double)
    return model


KINDS = {
    "one pass": (head_and_embeddings, {}),
    "several losses": (head_and_embeddings, {"estimator": "true"}),
    "absolute": (head_and_embeddings, {"statistic": "absolute"}),
    "recomputed": (recomputed, {}),
    "one by one": (one_by_one, {}),
}


def model_and_options(kind):
    build, options = KINDS[kind]
    return build(), options


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


def check_faults(kind, attempts, monkeypatch, trials):
    """Single faults at so many operations in turn: of forward, backward, rules and sums."""
    # A tensor's examples go into its sums a few at a time.
    monkeypatch.setattr("fish_tuning.per_example.accumulate.CHUNK_ENTRIES", 2 * 48)
    model, options = model_and_options(kind)
    # Without padding, so that all are one part; the second batch is not the one that is checked.
    batches = batches_of(examples_for(model, 8, shortest=6, longest=6), 4)
    expected = scored(model, batches, **options)
    counter = Fault(0)
    attempts.of = lambda numbers: counter
    scored(model, batches, **options)
    total = -counter.left
    assert total > 500
    found = 0
    every = total / trials
    for at in (1 + int(every * (i + 0.3)) for i in range(trials)):
        fault = Fault(at)
        attempts.of = lambda numbers, fault=fault: fault
        attempts.sizes.clear()
        try:
            scores = scored(model, batches, **options)
        except torch.OutOfMemoryError:
            # The fault met an example that was alone already.
            assert attempts.sizes[-1] == 1
            continue
        found += attempts.sizes[:2] != [4, 4]
        assert_scores_close(scores, expected, 1e-9)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_operation(kind, attempts, monkeypatch):
    """Guards against what an attempt that failed half-way leaves in the sums, or loses."""
    assert check_faults(kind, attempts, monkeypatch, 7) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_every_operation(kind, attempts, monkeypatch):
    """Guards the same, many times over."""
    assert check_faults(kind, attempts, monkeypatch, 200) >= 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fits", [1, 2, 3])
def test_every_attempt_on_more_than_fits_fails(kind, fits, attempts, caplog):
    """Guards halves of halves, each after another part of the sums; and that sizes are kept."""
    model, options = model_and_options(kind)
    batches = batches_of(examples_for(model, 13, shortest=6, longest=6), 7)
    expected = scored(model, batches, **options)
    draw = random.Random(0)
    errors = [torch.OutOfMemoryError("CUDA out of memory"), ALLOCATOR, "MPS backend out of memory"]
    attempts.of = lambda numbers: (
        Fault(draw.randrange(1, 1500), draw.choice(errors)) if len(numbers) > fits else None
    )
    attempts.sizes.clear()
    caplog.clear()
    assert_scores_close(scored(model, batches, **options), expected, 1e-9)
    said = [m for m in caplog.messages if m.startswith("Memory does not suffice for")]
    failed = re.findall(
        r"for (\d+) examples at a time: scoring continues with (\d+)", "".join(said)
    )
    # A fault may lie beyond the last operation of a small part.
    assert ("7", "4") in failed and all(int(b) == (int(a) + 1) // 2 for a, b in failed)
    # Once smaller, parts stay small: nothing fails twice for the same reason.
    assert len(said) == len(set(said)) <= 3


def test_one_example_that_does_not_fit(attempts):
    """Guards an endless loop, and an error that names no example and no way out."""
    model = head_and_embeddings()
    batches = batches_of(examples_for(model, 6, shortest=6, longest=6), 3)
    attempts.of = lambda numbers: Fault(300) if 4 in numbers else None
    said = r"score calibration example 4 alone: shorten the examples.*DefaultCPUAllocator"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        scored(model, batches)
    assert attempts.sizes == [3, 3, 2, 1, 1]
    # What it borrowed is given back, and it scores again.
    attempts.of = lambda numbers: None
    scored(model, batches)


def test_a_loss_fn_gets_whole_batches(attempts):
    """Guards a loss that looks at the whole batch against a half of it."""
    model = head_and_embeddings()
    batches = batches_of(examples_for(model, 6, shortest=6, longest=6), 3)
    attempts.of = lambda numbers: Fault(300)

    def loss_fn(outputs, batch):
        assert len(batch["labels"]) == 3
        return nn.functional.cross_entropy(outputs.logits, batch["labels"], reduction="none")

    with pytest.raises(torch.OutOfMemoryError, match="3 calibration examples at a time, as a loss"):
        scored(model, batches, loss_fn=loss_fn)


def test_other_errors_are_not_taken_for_it(attempts):
    """Guards against an error in the model that is repeated for each half and then disguised."""
    model = head_and_embeddings()
    attempts.of = lambda numbers: Fault(300, "mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):
        scored(model, batches_of(examples_for(model, 6), 6))
    assert len(attempts.sizes) == 1


REAL = """
import logging, resource, sys
import torch
from torch import nn
from fish_tuning import calculate_fisher_information

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        wide = self.first(x).repeat(1, 4096)
        for _ in range(4):
            wide = wide.sin()
        return self.last(wide.view(len(x), 4096, 8).mean(1))

logging.basicConfig(level=logging.WARNING, format="%(message)s")
model = Wide()
batch = {"x": torch.randn(1024, 8), "labels": torch.randint(0, 3, (1024,))}
expected = calculate_fisher_information(model, [batch], progress=False)
print("whole", flush=True)
pages = int(open("/proc/self/statm").read().split()[0])
size = pages * resource.getpagesize() + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (size, size))
scores = calculate_fisher_information(model, [batch], progress=False)
for name, score in expected.items():
    torch.testing.assert_close(scores[name], score, rtol=1e-4, atol=0)
print("halves")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_an_allocator_that_really_fails():
    """Guards against an allocator's error that is not known as one."""
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", REAL],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["whole", "halves"]
    assert "Memory does not suffice for 1024 examples at a time" in done.stderr
