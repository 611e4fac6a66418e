"""A masked model beside a dense twin that masks by hand: what the tests of ordinary use compare.

Everything is float64, so that the two may differ by rounding alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fish_tuning import apply_mask
from tests.models import tiny_llama


class Net(nn.Module):
    """An embedding, two layers and a head over rows of six tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.lin0 = nn.Linear(8, 8)
        self.lin1 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.lin0(self.embedding(input_ids)))
        return self.head(x + torch.tanh(self.lin1(x)))


class TiedNet(Net):
    """A model of its own weights, two of which are one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight


LAYERS = ["lin0", "lin1"]
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}

CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(target_modules=LAYERS, **LORA),
    "dora": lambda: LoraConfig(target_modules=LAYERS, use_dora=True, **LORA),
    "embedding": lambda: LoraConfig(target_modules=["embedding", "lin0"], **LORA),
    "modules_to_save": lambda: LoraConfig(
        target_modules=["lin0"], modules_to_save=["head"], **LORA
    ),
    "ia3": lambda: IA3Config(
        target_modules=LAYERS, feedforward_modules=["lin1"], init_ia3_weights=False
    ),
    "vera": lambda: VeraConfig(target_modules=LAYERS, r=4, init_weights=False),
    "loha": lambda: LoHaConfig(target_modules=LAYERS, r=2, alpha=4, init_weights=False),
}

TIED = "tied adapter"
OWN = "own weights"
TWO = "two adapters"
TWO_IA3 = "two adapters, ia3"
KINDS = [*CONFIGS, TIED, OWN, TWO, TWO_IA3]


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Calls `build` with a random state of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def base_model(kind: str) -> nn.Module:
    """What adapters of this kind are put on."""
    if kind == TIED:
        return tiny_llama(tie_word_embeddings=True, num_hidden_layers=1).double()
    return seeded(TiedNet if kind == OWN else Net).double()


def config_of(kind: str) -> Any:
    """A new config: PEFT writes into the one that it is given."""
    if kind == TIED:
        return LoraConfig(
            target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True, **LORA
        )
    return CONFIGS[{TWO: "lora", TWO_IA3: "ia3"}.get(kind, kind)]()


def dense_model(kind: str) -> nn.Module:
    """A model of this kind without a mask, its first adapter active."""
    model = base_model(kind)
    if kind == OWN:
        return model
    model = seeded(lambda: get_peft_model(model, config_of(kind)), 1)
    if kind in (TWO, TWO_IA3):
        seeded(lambda: model.add_adapter("other", config_of(kind)), 2)
    if kind == TIED:
        # It adds to an embedding and a head, and would make a model that does not train.
        for name, p in model.named_parameters():
            if p.requires_grad and "lm_head" not in name:
                p.data *= 0.2
    return tied(copyable(model).double())


def copyable(model: Any) -> Any:
    """Without the tensor with a graph that PEFT keeps in a model whose adapters are tied."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.kwargs.pop("tied_adapter", None)
    return model


def random_bits(model: nn.Module, seed: int, density: float = 0.5) -> dict[str, Tensor]:
    """A mask of some entries of each trainable tensor, of none of one and of all of another."""
    generator = torch.Generator().manual_seed(seed)
    bits = {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    for chosen in bits.values():
        chosen.view(-1)[0], chosen.view(-1)[-1] = True, False
    if (pairs := _tied_to_embedding(model)) is not None:
        for ours, theirs in pairs.items():
            bits[theirs] = bits[ours].t().contiguous()
    elif len(bits) > 3 and seed % 2:
        some = list(bits.values())
        some[0].fill_(True)
        some[1].fill_(False)
    return bits


def _tied_to_embedding(model: nn.Module) -> dict[str, str] | None:
    """The names of the embedding's adapter, each with the head's that PEFT ties to it."""
    names = [name for name, _ in model.named_parameters()]
    embedding = [n for side in "BA" for n in names if f"lora_embedding_{side}" in n]
    head = [n for side in "AB" for n in names if f"lm_head.lora_{side}" in n]
    return dict(zip(embedding, head, strict=True)) if head else None


def tied(model: nn.Module) -> nn.Module:
    """Ties adapters by memory, as PEFT does: moving, copying and loading part them."""
    for ours, theirs in (_tied_to_embedding(model) or {}).items():
        tensor_of(model, theirs).data = tensor_of(model, ours).data.t()
    return model


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and the attribute's name."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A tensor by its plain name, whether it is a parameter or a buffer now."""
    owner, attribute = owner_of(model, name)
    return getattr(owner, attribute)


def values_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter that holds the selected entries of a tensor."""
    owner, attribute = owner_of(model, name)
    return owner._parameters[attribute]


def inputs(seed: int = 0) -> Tensor:
    return torch.randint(2, 12, (4, 6), generator=torch.Generator().manual_seed(seed))


def output_of(model: nn.Module, ids: Tensor) -> Tensor:
    """What the model computes: logits or a plain tensor."""
    result = model(input_ids=ids)
    return result if isinstance(result, Tensor) else result.logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return output_of(model, ids).square().mean()


@dataclass
class Twins:
    """A masked model, the dense one that does the same by hand, and what both have in common."""

    kind: str
    masked: nn.Module
    dense: nn.Module
    bits: dict[str, Tensor]
    optimizers: list[torch.optim.Optimizer] | None = None
    left_behind: list[tuple[nn.Module, dict[str, Tensor]]] = field(default_factory=list)
    """Models that were copied and not used since, with the state dict that they had."""

    @classmethod
    def build(cls, kind: str, seed: int = 1) -> Twins:
        dense = dense_model(kind)
        bits = random_bits(dense, seed)
        masked = apply_mask(tied(copied(dense)), bits)
        if kind in (TWO, TWO_IA3):
            for model in (masked, dense):
                model.set_adapter("other")
            others = random_bits(dense, seed + 1)
            apply_mask(masked, others)
            bits |= others
            for model in (masked, dense):
                model.set_adapter("default")
        return cls(kind, masked, dense, bits)

    def models(self) -> Iterator[nn.Module]:
        return iter((self.masked, self.dense))

    def backward(self, seed: int = 0) -> None:
        """Give both models the gradients of the same inputs."""
        for model in self.models():
            loss_of(model.eval(), inputs(seed)).backward()

    def names(self) -> list[str]:
        """The tensors that the mask names, each tied one by its first name."""
        pairs = _tied_to_embedding(self.dense) or {}
        return [name for name in self.bits if name not in pairs.values()]

    def tied_to(self, name: str) -> list[str]:
        """The names of a tensor, of which a tied one has two."""
        other = (_tied_to_embedding(self.dense) or {}).get(name)
        return [name] if other is None else [name, other]

    def partly(self) -> list[str]:
        """The tensors of which some entries are trained."""
        return [n for n in self.names() if self.bits[n].any() and not self.bits[n].all()]

    def trainable(self, model: nn.Module) -> set[str]:
        """The plain names of what is trained, without tensors that have no selected entry."""
        pairs = _tied_to_embedding(self.dense) or {}
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        names -= set(pairs.values())
        return {name for name in names if self.bits.get(name, torch.ones(1)).any()}

    def join_tied_gradients(self) -> None:
        """Gives the gradients of both uses of a tied adapter to one of the two parameters."""
        for ours, theirs in (_tied_to_embedding(self.dense) or {}).items():
            first, second = tensor_of(self.dense, ours), tensor_of(self.dense, theirs)
            if second.grad is not None and first.requires_grad:
                turned = second.grad.t()
                first.grad = turned.clone() if first.grad is None else first.grad + turned
            second.grad = None

    def mask_gradients(self) -> None:
        self.join_tied_gradients()
        for name, p in self.dense.named_parameters():
            if name in self.bits and p.grad is not None:
                p.grad *= self.bits[name]

    def step(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        """One optimizer step on gradients that both have; the twin's frozen entries are put back.

        Args:
            make: Builds an optimizer where there is none yet.
        """
        if self.optimizers is None:
            self.optimizers = [make(list(model.parameters())) for model in self.models()]
        self.mask_gradients()
        before = {name: tensor_of(self.dense, name).detach().clone() for name in self.bits}
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, bits in self.bits.items():
            tensor = tensor_of(self.dense, name)
            tensor.data.copy_(torch.where(bits, tensor.detach(), before[name]))

    # What both hold

    def assert_same_gradients(self) -> None:
        self.mask_gradients()
        for name in self.partly():
            ours, dense = values_of(self.masked, name).grad, tensor_of(self.dense, name).grad
            if dense is None:
                assert ours is None, name
            else:
                assert ours is not None, name
                assert_close(ours.reshape(-1), dense[self.bits[name]], name)

    def assert_same_state(self) -> None:
        ours, dense = self.masked.state_dict(), self.dense.state_dict()
        assert ours.keys() == dense.keys()
        for name, tensor in dense.items():
            assert_close(ours[name], tensor, name)

    def assert_same_output(self, ids: Tensor) -> None:
        with torch.no_grad():
            assert_both_close((output_of(model.eval(), ids) for model in self.models()), "output")


def assert_close(ours: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        ours, expected, rtol=1e-8, atol=1e-10, msg=lambda text: f"{name}: {text}"
    )


def assert_both_close(pair: Iterable[Tensor], name: str) -> None:
    ours, expected = pair
    assert_close(ours, expected, name)


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def reload(kind: str, folder: Any) -> PeftModel:
    """The plain PEFT model of a folder that a model of this kind was saved into."""
    model = PeftModel.from_pretrained(base_model(kind), folder, is_trainable=True)
    if kind in (TWO, TWO_IA3):
        model.load_adapter(folder / "other", "other", is_trainable=True)
    return copyable(model)
