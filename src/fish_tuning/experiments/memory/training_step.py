"""A step of the Trainer that an experiment trains with, to run on tensors without numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer

from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.memory.live_bytes import WithoutNumbers
from fish_tuning.experiments.models.checkpointing import enable_checkpointing

_NOT_ESTIMATED: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,  # `autocast` below does what accelerate would.
    "fp16": False,
    "bf16_full_eval": True,  # Then a Trainer leaves the model where it is until it trains.
    "do_train": False,
    "deepspeed": None,
    "fsdp": None,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "torch_compile": False,
}
"""Training arguments that need devices, other processes, files or a network."""


def peak_of_training(
    model: WithoutNumbers,
    config: ExperimentConfig,
    num_labels: int,
    *,
    kernels: bool,
    on_gradients: Callable[[], None] = lambda: None,
) -> int:
    """Bytes that a step of training takes at its highest point, the optimizer's left aside.

    Args:
        model: The arm's model.
        config: The experiment.
        num_labels: Number of the head's outputs; 0 for a language model.
        kernels: Whether the devices have TRL's kernels, which compute in place what other devices
            make several tensors for.
        on_gradients: Called after every backward pass.

    Raises:
        RuntimeError: As in `WithoutNumbers.peak`.
    """
    args = config.training_args
    dtype = torch.bfloat16 if args.get("bf16") else torch.float16 if args.get("fp16") else None
    model.model.train()
    with TemporaryDirectory() as folder, ExitStack() as stack:
        trainer = _trainer(model.model, config, Path(folder))
        stack.enter_context(_without_idle_masks(model.model))
        if kernels:
            stack.enter_context(_with_kernels())
        enable_checkpointing(model.model, args)

        collated = batch_of(config, num_labels, trainer)

        def run() -> None:
            # With several passes, gradients live through the next one.
            for _ in range(min(2, trainer.args.gradient_accumulation_steps)):
                batch = without_numbers(collated)
                labels = None if num_labels else (batch["labels"] != -100).sum()
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss: Any = trainer.compute_loss(model.model, batch, num_items_in_batch=labels)
                loss.backward()
                on_gradients()

        return model.peak(run)


def batch_of(
    config: ExperimentConfig, num_labels: int, trainer: Trainer | None = None
) -> Mapping[str, Any]:
    """A batch of the longest inputs, of which the last one is padded by one token.

    Args:
        config: The experiment.
        num_labels: Number of the head's outputs; 0 for a language model.
        trainer: A language model's Trainer, which makes batches of its own.
    """
    length, rows = config.max_length, batch_size(config)
    lengths = [length] * (rows - 1) + [max(1, length - (rows > 1))]
    if num_labels == 0 and trainer is not None:
        batch: Mapping[str, Any] = trainer.data_collator(
            [{"input_ids": [0] * n, "labels": [0] * n} for n in lengths]
        )
        return batch
    ids = torch.zeros(rows, length, dtype=torch.long)
    labels = torch.zeros(rows, dtype=torch.float32 if num_labels == 1 else torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels if num_labels else ids,
    }


def without_numbers(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a batch to be made within `WithoutNumbers.peak`."""
    return {
        name: torch.empty_like(value) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def batch_size(config: ExperimentConfig) -> int:
    """The number of examples of a training step on one device."""
    rows: int = config.training_args.get("per_device_train_batch_size", 8)
    return rows


def _trainer(model: nn.Module, config: ExperimentConfig, folder: Path) -> Trainer:
    from datasets import Dataset

    from fish_tuning.experiments.runs.arguments import training_arguments

    args: Any = training_arguments(config, folder, 0, **_NOT_ESTIMATED)
    if not config.is_generative:
        return Trainer(model, args, train_dataset=Dataset.from_dict({"input_ids": [[0]]}))

    from fish_tuning.experiments.runs.generative.trainer import GenerativeTrainer

    rows = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
    return GenerativeTrainer(model, args, train_dataset=rows, processing_class=_tokenizer())


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for batches of ids, which need no more than a token to pad with."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    backend = Backend(WordLevel({"[PAD]": 0}, unk_token="[PAD]"))
    tokens = dict.fromkeys(("unk_token", "pad_token", "eos_token"), "[PAD]")
    made: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = made(tokenizer_object=backend, **tokens)
    return tokenizer


@contextmanager
def _without_idle_masks(model: nn.Module) -> Iterator[None]:
    """Leave out the attention mask of a single row, as transformers does where nothing is padded.

    It would look at the numbers.
    """

    def leave_out(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None or len(mask) > 1:
            return None
        return args, {**kwargs, "attention_mask": None}

    hook = model.register_forward_pre_hook(leave_out, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _with_kernels() -> Iterator[None]:
    """Have TRL's tiles of logits folded without further tensors, as its kernels do."""
    module = sys.modules.get("trl.kernels.chunked_logprob")
    folds: Sequence[str] = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    with ExitStack() as stack:
        for name in folds:
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, lambda *_, **__: None))
        yield
