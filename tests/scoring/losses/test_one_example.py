"""What is said when a model takes a batch, but not one example of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fish_tuning import calculate_fisher_information

X, CLASSES = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)


class Weighted(Net):
    """Takes weights of classes, of which there may be as many as examples."""

    def forward(self, x, labels=None, weights=None):
        logits = self.a(x)
        loss = F.cross_entropy(logits, labels, weight=weights)
        return {"loss": loss, "logits": logits}


class Chosen(Net):
    """Chooses the weights itself, so that only some classes show what is missing."""

    def forward(self, x, labels=None, weights=None):
        logits = self.a(x)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": (weights[labels] * losses).mean(), "logits": logits}


class TwoInputs(Net):
    def forward(self, x, labels=None):
        logits = self.a(x[0]) + self.b(x[1])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (Weighted, {"x": X, "labels": CLASSES, "weights": torch.tensor([0.2, 1.0, 4.0])}),
        (Chosen, {"x": X, "labels": CLASSES, "weights": torch.tensor([0.2, 1.0, 4.0])}),
        (TwoInputs, {"x": [X[:2], X[1:]], "labels": CLASSES[:2]}),
    ],
)
def test_as_many_entries_as_examples_by_chance(build, batch):
    """Guards against the model's own error, which does not say what divided the batch."""
    with pytest.raises(ValueError, match=r"but not a single example of it: .* \(batch_size=1\)"):
        calculate_fisher_information(build(), [batch], progress=False)


def test_an_error_of_the_whole_batch_stays_the_models_own():
    """Guards against blaming the division for a batch that the model does not take."""
    batch = {"x": torch.randn(3, 5), "labels": CLASSES}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calculate_fisher_information(Weighted(), [batch], progress=False)
