"""Closed forms of per-example gradients, by kind of module and name of the parameter.

For a linear layer with input ``x`` and output gradient ``g``, the gradient of example ``b`` is
``sum_t g[b, t] x[b, t]^T``. Each form below is such a product of two tensors that an ordinary
backward pass visits anyway.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fish_tuning.parts import Part
from fish_tuning.per_example.rows import add_rows

ClosedForm = Callable[[nn.Module, Tensor, Tensor, Part], Tensor]
"""(module, its input, the gradient of its output, the parameter's rows that are wanted) ->
gradients, (b, *shape of these rows)."""


def closed_form_of(module: nn.Module, attribute: str) -> ClosedForm | None:
    """The closed form for a parameter of a module, or None if there is none."""
    # transformers has an RMSNorm class for each model. If one computes something else under that
    # name, the comparison of the first batch with autograd finds it.
    if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) and attribute == "weight":
        takes_one_input = len(inspect.signature(module.forward).parameters) == 1
        return _rms_norm_weight if takes_one_input else None
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return None
    return _CLOSED_FORMS.get((type(module).forward, attribute))


def _tokens(tensor: Tensor) -> Tensor:
    """Flattens all positions of an example into one axis: (b, ..., d) -> (b, t, d)."""
    return tensor if tensor.dim() == 3 else tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _linear_weight(module: nn.Module, x: Tensor, g: Tensor, part: Part) -> Tensor:
    """`y = x W^T`: (b, t, i), (b, t, o) -> (b, o, i)."""
    return torch.bmm(part.take(_tokens(g), 2).transpose(1, 2), _tokens(x))


def _conv1d_weight(module: nn.Module, x: Tensor, g: Tensor, part: Part) -> Tensor:
    """`y = x W`, the transposed linear layer of GPT-2: (b, t, i), (b, t, o) -> (b, i, o)."""
    return _linear_weight(module, g, x, part)


def _bias(module: nn.Module, x: Tensor, g: Tensor, part: Part) -> Tensor:
    """`y = ... + b`: (b, t, o) -> (b, o)."""
    return part.take(_tokens(g), 2).sum(1)


def embedding_weight(module: Any, x: Tensor, g: Tensor, part: Part) -> Tensor:
    """`y = W[x]`: (b, t), (b, t, d) -> (b, vocabulary, d)."""
    ids, g = embedding_rows(module, x, g)
    examples, vocabulary = len(g), module.weight.shape[0]
    rows = ids + vocabulary * torch.arange(examples, device=ids.device).unsqueeze(1)
    gradients = g.new_zeros(examples * vocabulary, g.shape[-1])
    gradients = add_rows(gradients, rows.flatten(), g.flatten(0, 1))
    return part.take(gradients.unflatten(0, (examples, vocabulary)), 1)


def embedding_rows(module: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The looked-up rows, (b, t), and what each lookup adds to its row's gradient, (b, t, d)."""
    ids, g = x.reshape(len(x), -1), _tokens(g)
    if module.padding_idx is not None:
        g = g * (ids != module.padding_idx).unsqueeze(-1)
    return ids, g


def _layer_norm_weight(module: Any, x: Tensor, g: Tensor, part: Part) -> Tensor:
    """`y = w * normalized(x) + b` over the last axis: (b, t, d), (b, t, d) -> (b, d)."""
    return part.take(_tokens(F.layer_norm(x, x.shape[-1:], eps=module.eps) * g), 2).sum(1)


def _rms_norm_weight(module: nn.Module, x: Tensor, g: Tensor, part: Part) -> Tensor:
    """`y = w * n(x)` or `(1 + w) * n(x)`, where n is the norm: (b, t, d), (b, t, d) -> (b, d).

    The module itself computes n(x), because some modules round to float32 on the way.
    """
    shape = module.get_parameter("weight").shape
    at_one, at_zero = (
        functional_call(module, {"weight": x.new_full(shape, value)}, x) for value in (1, 0)
    )
    return part.take(_tokens((at_one - at_zero) * g), 2).sum(1)


# By forward function rather than by class: a subclass that computes something else has its own
# forward, and so gets no closed form.
_CLOSED_FORMS: dict[tuple[Callable[..., Any], str], ClosedForm] = {
    (nn.Linear.forward, "weight"): _linear_weight,
    (nn.Linear.forward, "bias"): _bias,
    (Conv1D.forward, "weight"): _conv1d_weight,
    (Conv1D.forward, "bias"): _bias,
    (nn.Embedding.forward, "weight"): embedding_weight,
    (nn.LayerNorm.forward, "weight"): _layer_norm_weight,
    (nn.LayerNorm.forward, "bias"): _bias,
}
