"""Random combinations of a model, a loss, a form of batch and padding, with reference scores.

Each part stands alone and knows what it may be combined with. The reference is a loop over the
model's own loss of one example at a time, as the batch gives that example.
"""

import random
from collections import UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tr
from peft import IA3Config, get_peft_model
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

from tests.models import (
    IGNORED,
    PAD,
    VOCABULARY,
    pad,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
    tiny_t5,
    tiny_vit,
    with_lora,
)

Example = dict[str, Any]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "initializer_range": 0.2,
    "hidden_size": 12,
    "intermediate_size": 20,
    "max_position_embeddings": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}


def _seeded(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config)


ENCODERS: dict[str, Callable[..., Any]] = {
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "electra": lambda **config: _seeded(
        tr.ElectraForSequenceClassification, tr.ElectraConfig(**{**SIZES, **config})
    ),
    "deberta": lambda **config: _seeded(
        tr.DebertaV2ForSequenceClassification, tr.DebertaV2Config(**{**SIZES, **config})
    ),
    "big_bird": lambda **config: _seeded(
        tr.BigBirdForSequenceClassification,
        tr.BigBirdConfig(**{**SIZES, "block_size": 2, "num_random_blocks": 1, **config}),
    ),
    "fnet": lambda **config: _seeded(
        tr.FNetForSequenceClassification,
        tr.FNetConfig(**{**SIZES, **config}),
    ),
}
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "qwen2": lambda: _seeded(tr.Qwen2ForCausalLM, tr.Qwen2Config(**GROUPED)),
    "mistral": lambda: _seeded(tr.MistralForCausalLM, tr.MistralConfig(**GROUPED)),
    "gemma2": lambda: _seeded(tr.Gemma2ForCausalLM, tr.Gemma2Config(**GROUPED, head_dim=6)),
    "gpt_neox": lambda: _seeded(tr.GPTNeoXForCausalLM, tr.GPTNeoXConfig(**SIZES)),
    "bloom": lambda: _seeded(
        tr.BloomForCausalLM,
        tr.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=12, n_layer=2, n_head=2, initializer_range=0.2
        ),
    ),
    "opt": lambda: _seeded(
        tr.OPTForCausalLM,
        tr.OPTConfig(
            vocab_size=VOCABULARY,
            pad_token_id=PAD,
            init_std=0.2,
            hidden_size=12,
            ffn_dim=20,
            word_embed_proj_dim=12,
            max_position_embeddings=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
    ),
}
SEQ2SEQ: dict[str, Callable[[], Any]] = {"t5": tiny_t5, "bart": tiny_bart}
TASKS = ("single", "multi", "regression", "token")
FAMILIES = (
    *((name, task) for name in ENCODERS for task in ("single", "multi", "regression")),
    ("bert", "token"),
    ("roberta", "token"),
    *((name, "causal") for name in DECODERS),
    *((name, "seq2seq") for name in SEQ2SEQ),
    ("vit", "image"),
)


def build(family: str, task: str) -> Any:
    """A tiny model in float64 without dropout."""
    if task == "image":
        return tiny_vit()
    if task == "causal":
        return DECODERS[family]()
    if task == "seq2seq":
        return SEQ2SEQ[family]()
    if task == "token":
        return ENCODERS[family](task="TokenClassification")
    kind = {
        "single": {"num_labels": 3},
        "multi": {"num_labels": 3, "problem_type": "multi_label_classification"},
        "regression": {"num_labels": 2, "problem_type": "regression"},
    }
    return ENCODERS[family](**kind[task])


def _lora(model: Any, rng: random.Random) -> Any:
    return with_lora(model, r=2, init_lora_weights=False, lora_dropout=0.0)


def _ia3(model: Any, rng: random.Random) -> Any:
    names = [name for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    names = [name for name in names if "head" not in name and "classifier" not in name]
    return get_peft_model(
        model, IA3Config(target_modules=names, feedforward_modules=[], init_ia3_weights=False)
    )


def _base(model: Any, rng: random.Random) -> Any:
    """Some of the model's own weights."""
    for parameter in model.parameters():
        parameter.requires_grad_(rng.random() < 0.5)
    next(iter(model.parameters())).requires_grad_(True)
    return model


def _biases(model: Any, rng: random.Random) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("bias", "norm.weight", "classifier.weight")))
    return model if any(p.requires_grad for p in model.parameters()) else _base(model, rng)


ADAPTERS = {"lora": _lora, "ia3": _ia3, "base": _base, "biases": _biases}

CLASS_WEIGHTS = (1.0, 8.0, 0.2)


def _ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


ALTERNATIVE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "smoothing": lambda z, y, w: F.cross_entropy(z, y, label_smoothing=0.1),
    "focal": lambda z, y, w: ((1 - (-_ce(z, y)).exp()) ** 2 * _ce(z, y)).mean(),
    "weighted examples": lambda z, y, w: (_ce(z, y) * z.new_tensor(CLASS_WEIGHTS)[y]).mean(),
    "sum": lambda z, y, w: _ce(z, y).sum(),
    "sample weights": lambda z, y, w: (_ce(z, y) * (1 if w is None else w)).mean(),
    "with a penalty": lambda z, y, w: _ce(z, y).mean() + 0.1 * z.square().mean(),
    # No example has these losses on its own.
    "weighted mean": lambda z, y, w: F.cross_entropy(z, y, weight=z.new_tensor(CLASS_WEIGHTS)),
    "contrastive": lambda z, y, w: F.cross_entropy(
        F.normalize(z) @ F.normalize(z).T * 5, torch.arange(len(z))
    ),
    "centred": lambda z, y, w: (z - z.mean(0)).square().mean() + _ce(z, y).mean(),
    "detached": lambda z, y, w: _ce(z, y).mean().detach(),
}
"""(logits, labels, sample weights) -> the loss of a batch of a single-label classifier."""

OF_THE_BATCH = {"weighted mean", "contrastive", "centred"}
"""Losses that must be refused, or scored as an example contributes to the batch's loss."""


class OwnLoss(nn.Module):
    """A classifier that computes another loss than transformers does."""

    def __init__(self, inner: Any, loss: str) -> None:
        super().__init__()
        self.inner, self.loss = inner, loss
        self.config = inner.config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> ModelOutput:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = None
        if labels is not None:
            loss = ALTERNATIVE_LOSSES[self.loss](logits, labels, sample_weight)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class TakesAnything(nn.Module):
    """Hands all its arguments on, as many wrappers do."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, **arguments: Any) -> Any:
        return self.inner(**arguments)


class ReturnsTuple(TakesAnything):
    """A model from before transformers had output classes."""

    def forward(self, **arguments: Any) -> Any:
        return self.inner(**arguments).to_tuple()


class Nested(TakesAnything):
    """Takes its input in a dictionary, beside the labels."""

    def forward(self, inputs: dict[str, Tensor], labels: Tensor | None = None) -> Any:
        return self.inner(**inputs, labels=labels)


@dataclass
class Combination:
    """What is drawn, and how to run it.

    Attributes:
        name: All parts, to show in failures.
        model: The model, adapted, in float64.
        loader: What is given to `calculate_fisher_information`.
        singles: Arguments of the model for each example alone.
        may_refuse: Whether one clear sentence is a right answer too.
        must_refuse: Whether a batch has a loss that is not the mean of its examples' losses.
        options: More arguments of `calculate_fisher_information`.
    """

    name: str
    model: Any
    loader: Any
    singles: list[Example]
    may_refuse: bool
    must_refuse: bool
    options: dict[str, Any]


def draw(seed: int) -> Combination:
    """The combination that a seed gives."""
    rng = random.Random(seed)
    family, task = rng.choice(FAMILIES)
    adapter = rng.choice([*ADAPTERS])
    loss = "own"
    if task == "single" and rng.random() < 0.6:
        loss = rng.choice([*ALTERNATIVE_LOSSES])
    inner = ADAPTERS[adapter](_without_dropout(build(family, task)).double(), rng).double()
    examples = _examples(inner, task, rng.randint(2, 7), seed, weighted=loss == "sample weights")
    model = inner if loss == "own" else OwnLoss(inner, loss)
    size = rng.choice([1, 2, 3, 8])
    form = rng.choice(_forms(task, loss))
    model, loader, singles, may_refuse = FORMS[form](model, examples, size, rng)
    options: dict[str, Any] = {"statistic": rng.choice(["squared", "squared", "absolute"])}
    if loss in OF_THE_BATCH | {"detached"}:
        may_refuse = True
    return Combination(
        f"seed {seed}: {family} {task}, {adapter}, loss {loss}, {form}, "
        f"{len(singles)} examples in batches of {size}, {options}",
        model.eval(),
        loader,
        singles,
        may_refuse,
        loss in OF_THE_BATCH and _differ(loss, examples, size),
        options,
    )


def _differ(loss: str, examples: list[Example], size: int) -> bool:
    """Whether the loss of some batch is not the mean of its examples' losses alone."""
    chunks = [*_chunks(examples, size)]
    if loss == "weighted mean":  # The weights cancel out where all examples have one class.
        return any(len({int(example["labels"]) for example in chunk}) > 1 for chunk in chunks)
    return len(chunks[0]) > 1


def _without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def _examples(model: Any, task: str, n: int, seed: int, weighted: bool) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    examples: list[Example] = []
    for _ in range(n):
        example: Example = {}
        if task == "image":
            example["pixel_values"] = torch.randn(3, 8, 8, generator=generator).double()
            example["labels"] = integers(0, 3)
        else:
            ids = integers(2, VOCABULARY, int(integers(4, 12)))
            example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if task == "single":
            example["labels"] = integers(0, 3)
        elif task == "multi":
            example["labels"] = integers(0, 2, 3).double()
        elif task == "regression":
            example["labels"] = torch.randn(2, generator=generator).double()
        elif task == "seq2seq":
            example["labels"] = integers(2, VOCABULARY, int(integers(2, 7)))
        elif task in ("token", "causal"):
            labels = ids.clone() if task == "causal" else integers(0, 3, len(ids))
            hidden = torch.rand(len(ids), generator=generator) < 0.3
            hidden[-1] = False
            example["labels"] = labels.masked_fill(hidden, IGNORED)
        if weighted:
            example["sample_weight"] = torch.rand((), generator=generator).double() + 0.1
        examples.append(example)
    return examples


Drawn = tuple[Any, Any, list[Example], bool]


def _chunks(examples: list[Example], size: int) -> Iterable[list[Example]]:
    return (examples[i : i + size] for i in range(0, len(examples), size))


def _rows(batches: Iterable[Example]) -> list[Example]:
    """Each row of padded batches alone, with its padding."""
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]


def _padded(side: str, kind: Callable[[Example], Any] = dict) -> Callable[..., Drawn]:
    def form(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
        batches = [pad(chunk, side=side) for chunk in _chunks(examples, size)]
        singles = _rows(batches)
        decoder = getattr(model, "can_generate", bool)() and not model.config.is_encoder_decoder
        if side == "left" and decoder:
            # Positions that skip the padding make an example what it is without padding.
            singles = [pad([example]) for example in examples]
        # BLOOM's attention is NaN where a row of its mask is empty.
        may_refuse = side == "left" and model.config.model_type == "bloom"
        return model, [kind(batch) for batch in batches], singles, may_refuse

    return form


def _more_padding(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    """Padded to a multiple, as collators do for the sake of speed."""
    batches = []
    for chunk in _chunks(examples, size):
        longest = pad([{key: value for key, value in e.items()} for e in chunk])
        width = 16 - longest["input_ids"].shape[1]
        fills = {"labels": IGNORED, "input_ids": PAD}
        batches.append(
            {
                key: F.pad(value, (0, width), value=fills.get(key, 0))
                if value.dim() == 2 and value.shape == longest["input_ids"].shape
                else value
                for key, value in longest.items()
            }
        )
    return model, batches, _rows(batches), False


def _extra_column(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    model, batches, singles, _ = _padded("right")(model, examples, size, rng)
    for batch in batches:
        n = len(batch["labels"])
        batch["text"], batch["length"] = ["words"] * n, torch.arange(n)
    return model, batches, singles, False


def _kwargs(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    _, batches, singles, _ = _padded("right")(model, examples, size, rng)
    return TakesAnything(model), batches, singles, False


def _tuple_output(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    _, batches, singles, _ = _padded("right")(model, examples, size, rng)
    return ReturnsTuple(model), batches, singles, True


def _nested(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    _, batches, singles, _ = _padded("right")(model, examples, size, rng)

    def nest(batch: Example) -> Example:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return {"inputs": inputs, "labels": batch["labels"]}

    return Nested(model), [*map(nest, batches)], [*map(nest, singles)], True


def _pairs(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    """(inputs, labels), both tensors."""
    batches = [pad(chunk) for chunk in _chunks(examples, size)]
    first = "input_ids" if "input_ids" in batches[0] else "pixel_values"
    kind = rng.choice([tuple, list])
    pairs = [kind((batch[first], batch["labels"])) for batch in batches]
    bare = [{first: batch[first], "labels": batch["labels"]} for batch in batches]
    return model, pairs, _rows(bare), True


def _triples(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    """(ids, attention mask, labels), as a TensorDataset gives them."""
    batches = [pad(chunk) for chunk in _chunks(examples, size)]
    triples = [tuple(batch.values()) for batch in batches]
    return model, triples, _rows(batches), True


def _dict_and_labels(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    batches = [pad(chunk) for chunk in _chunks(examples, size)]
    pairs = [
        ({key: value for key, value in batch.items() if key != "labels"}, batch["labels"])
        for batch in batches
    ]
    return model, pairs, _rows(batches), True


def _the_data_set(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    """The examples themselves, where batches are expected."""
    return model, examples, [pad([e]) for e in examples], True


def _lists_of_lists(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    """What a collator that does not build tensors hands out."""
    return model, [*_chunks(examples, size)], [pad([e]) for e in examples], True


def _numbers(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    """Lists of numbers in place of tensors."""
    batches = [pad(chunk) for chunk in _chunks(examples, size)]
    lists = [{key: value.tolist() for key, value in batch.items()} for batch in batches]
    return model, lists, _rows(batches), True


def _one_batch(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    batch = pad(examples)
    return model, batch, _rows([batch]), True


def _flattened(model: Any, examples: list[Example], size: int, rng: random.Random) -> Drawn:
    """All examples of a batch in one row; positions start again."""
    batches = []
    for chunk in _chunks(examples, size):
        batch = {
            key: torch.cat([example[key] for example in chunk]).unsqueeze(0)
            for key in ("input_ids", "labels")
        }
        starts = torch.cat([torch.arange(len(example["input_ids"])) for example in chunk])
        batch["position_ids"] = starts.unsqueeze(0)
        first = torch.cat([F.one_hot(torch.tensor(0), len(e["input_ids"])) for e in chunk])
        batch["labels"] = batch["labels"].masked_fill(first.bool().unsqueeze(0), IGNORED)
        batches.append(batch)
    singles = [
        {key: value.unsqueeze(0) for key, value in example.items() if key != "attention_mask"}
        for example in examples
    ]
    takes_positions = model.config.model_type not in ("bloom", "opt")
    return model, batches, singles, not takes_positions or hasattr(model, "peft_config")


FORMS: dict[str, Callable[..., Drawn]] = {
    "right": _padded("right"),
    "left": _padded("left"),
    "batch encoding": _padded("right", tr.BatchEncoding),
    "user dict": _padded("right", UserDict),
    "more padding": _more_padding,
    "extra column": _extra_column,
    "kwargs": _kwargs,
    "tuple output": _tuple_output,
    "nested": _nested,
    "pairs": _pairs,
    "triples": _triples,
    "dict and labels": _dict_and_labels,
    "data set": _the_data_set,
    "lists of lists": _lists_of_lists,
    "numbers": _numbers,
    "one batch": _one_batch,
    "flattened": _flattened,
}


def _forms(task: str, loss: str) -> list[str]:
    names = set(FORMS)
    if task != "causal":
        names -= {"flattened"}
    if task == "image":
        names -= {"left", "more padding", "triples"}
    if loss == "sample weights":
        names -= {"pairs", "triples"}
    if loss != "own":
        names -= {"tuple output", "nested"}
    return sorted(names)


def reference(combination: Combination) -> dict[str, Tensor]:
    """The mean power of each example's gradient, by a loop."""
    model = combination.model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    power = 2 if combination.options["statistic"] == "squared" else 1
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for example in combination.singles:
        outputs = model(**example)
        loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
        if not loss.requires_grad:  # The likelihood of the same value is scored.
            loss = F.cross_entropy(outputs.logits, example["labels"])
        gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.abs() ** power
    return {name: total / len(combination.singles) for name, total in sums.items()}
