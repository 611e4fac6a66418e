"""Loss, perplexity and accuracy per token of a language model, over a whole data set."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fish_tuning.experiments.metrics.names import diverged

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import EvalPrediction


def token_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum up what a language model predicts for each row of a batch.

    Args:
        logits: Shape (rows, length, vocabulary).
        labels: Shape (rows, length); -100 where a token does not count.

    Returns:
        Shape (rows, 3): negative log-likelihood in nats, number of tokens whose most likely
        prediction is right, and number of tokens.
    """
    import torch
    from torch.nn.functional import cross_entropy

    # The logits at a position predict the next token.
    targets = labels[:, 1:].to(logits.device)
    counted = targets != -100
    # Only positions that count: a prompt is often longer than its completion.
    predicted, expected = logits[:, :-1][counted].float(), targets[counted]
    values = torch.stack(
        [
            cross_entropy(predicted, expected, reduction="none"),
            (predicted.argmax(-1) == expected).float(),
            torch.ones_like(expected, dtype=torch.float32),
        ],
        dim=-1,
    )
    by_position = values.new_zeros(*targets.shape, 3)
    by_position[counted] = values
    return by_position.sum(1)


def compute_token_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    """Compute the metrics of a data set from its rows' sums: a `compute_metrics` for a Trainer.

    - `loss` is the mean negative log-likelihood per token, in nats, over all tokens that count. It
      does not depend on the batch size, as a mean over batches would.
    - `perplexity` is its exponential.
    - `token_accuracy` is the fraction of tokens that are the model's most likely prediction.
    """
    import numpy as np

    sums: Any = np.asarray(evaluated.predictions, dtype=np.float64)
    total, right, tokens = sums.sum(axis=0).tolist()
    loss = total / tokens
    if not math.isfinite(loss):
        raise diverged("the loss is not finite")
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": right / tokens}
