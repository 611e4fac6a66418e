"""Closed forms of per-example gradients, by type of module and name of the parameter.

For a linear layer with input ``x`` and output gradient ``g`` the gradient of example ``b`` is
``sum_t g[b, t] x[b, t]^T``. Each rule below is such a product of what backward visits anyway.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

Rule = Callable[[nn.Module, Tensor, Tensor], Tensor]


def rule_for(module: nn.Module, attribute: str) -> Rule | None:
    """What gives the gradients (b, *shape) of a module's parameter, from the module, its input and
    its output's gradient; None where no closed form is known."""
    # transformers writes one RMSNorm class a model; one that borrows the name for something else
    # is caught when the first batch is compared with autograd.
    if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) and attribute == "weight":
        takes_one_input = len(inspect.signature(module.forward).parameters) == 1
        return _rms_norm_weight if takes_one_input else None
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return None
    return _RULES.get((type(module).forward, attribute))


def _tokens(tensor: Tensor) -> Tensor:
    """Folds all positions of an example into one axis: (b, ..., d) -> (b, t, d)."""
    return tensor if tensor.dim() == 3 else tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _linear_weight(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """y = x W^T: (b, t, i), (b, t, o) -> (b, o, i)."""
    return torch.bmm(_tokens(g).transpose(1, 2), _tokens(x))


def _conv1d_weight(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """y = x W, GPT-2's transposed linear layer: (b, t, i), (b, t, o) -> (b, i, o)."""
    return _linear_weight(module, g, x)


def _bias(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """y = ... + b: (b, t, o) -> (b, o)."""
    return _tokens(g).sum(1)


def embedding_weight(module: Any, x: Tensor, g: Tensor) -> Tensor:
    """y = W[x]: (b, t), (b, t, d) -> (b, vocabulary, d)."""
    ids, g = embedding_rows(module, x, g)
    rows = g.new_zeros(len(g), module.weight.shape[0], g.shape[-1])
    return rows.scatter_add_(1, ids.unsqueeze(-1).expand_as(g), g)


def embedding_rows(module: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that are looked up (b, t), and what each of them adds to the gradient (b, t, d)."""
    ids, g = x.reshape(len(x), -1), _tokens(g)
    if module.padding_idx is not None:
        g = g * (ids != module.padding_idx).unsqueeze(-1)
    return ids, g


def _layer_norm_weight(module: Any, x: Tensor, g: Tensor) -> Tensor:
    """y = w * normalized(x) + b over the last axis: (b, t, d), (b, t, d) -> (b, d)."""
    return _tokens(F.layer_norm(x, x.shape[-1:], eps=module.eps) * g).sum(1)


def _rms_norm_weight(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """y = w * n(x) or (1 + w) * n(x), n the norm: (b, t, d), (b, t, d) -> (b, d).

    The module itself computes n(x): some round to float32 in between, whatever the input is.
    """
    like = module.get_parameter("weight").to(x.dtype)
    at_one, at_zero = (
        functional_call(module, {"weight": torch.full_like(like, value)}, x) for value in (1, 0)
    )
    return _tokens((at_one - at_zero) * g).sum(1)


# By forward function and not by class: a subclass that computes something else has another
# forward, and so no rule.
_RULES: dict[tuple[Callable[..., Any], str], Rule] = {
    (nn.Linear.forward, "weight"): _linear_weight,
    (nn.Linear.forward, "bias"): _bias,
    (Conv1D.forward, "weight"): _conv1d_weight,
    (Conv1D.forward, "bias"): _bias,
    (nn.Embedding.forward, "weight"): embedding_weight,
    (nn.LayerNorm.forward, "weight"): _layer_norm_weight,
    (nn.LayerNorm.forward, "bias"): _bias,
}
