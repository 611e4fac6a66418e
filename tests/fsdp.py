"""FSDP2 through accelerate and the Trainer in gloo processes on CPUs."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from accelerate.state import AcceleratorState, DistributedType, PartialState

from fish_tuning import (
    FishConfig,
    FishTuningCallback,
    FishTuningTrainer,
    get_fish_model,
    get_mask,
    mask_trainer,
)
from fish_tuning.engines import is_sharded
from tests import training
from tests.models import examples_for, pad, tiny_llama, with_lora
from tests.training import WORDS, tensors_of, tiny_tokenizer

EXAMPLES, STEPS = 40, 20


@functools.cache
def let_accelerate_divide_on_cpus() -> None:
    """Have accelerate choose FSDP on CPUs: it does so on accelerators only, and ignores a plugin.

    Everything after this choice is accelerate's own.
    """
    init = AcceleratorState.__init__

    @functools.wraps(init)
    def choose(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = choose


def llama(dtype: torch.dtype = torch.float64) -> Any:
    return with_lora(tiny_llama(), init_lora_weights=False, lora_dropout=0.0).to(dtype)


def arguments(folder: Path, count: int, kind: Any = tr.TrainingArguments, **settings: Any) -> Any:
    """Arguments with which `count` processes train on four examples per step, divided by FSDP2."""
    config = settings.pop("fsdp_config", {})
    if count > 1:
        settings |= {"fsdp": True, "fsdp_config": config}
    ours = {"max_steps": STEPS, "per_device_train_batch_size": 4 // count, "logging_steps": 5}
    return training.arguments(folder, kind, **{**ours, **settings})


def of_transformers(kind: Any, folder: Path, count: int, settings: Any, **options: Any) -> Any:
    """A Trainer of transformers' or our own."""
    model = llama(settings.pop("dtype", torch.float64))
    return kind(
        model=model,
        args=arguments(folder, count, **settings),
        train_dataset=examples_for(model, EXAMPLES),
        data_collator=pad,
        **options,
    )


def masked_by_itself(folder: Path, count: int, settings: Any) -> Any:
    """Our Trainer, which scores when training starts."""
    config = FishConfig(keep_ratio=settings.pop("keep_ratio", 0.3))
    return of_transformers(FishTuningTrainer, folder, count, settings, fish_config=config)


def masked_before(folder: Path, count: int, settings: Any) -> Any:
    """transformers' Trainer with our callback, and a model that is masked already."""
    config = FishConfig(keep_ratio=settings.pop("keep_ratio", 0.3))
    trainer = of_transformers(tr.Trainer, folder, count, settings)
    get_fish_model(trainer.model, config, trainer.get_train_dataloader(), progress=False)
    return tr.Trainer(
        trainer.model,
        trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=pad,
        callbacks=[FishTuningCallback()],
    )


def of_trl(folder: Path, count: int, settings: Any) -> Any:
    """TRL's SFTTrainer, masked once it is built."""
    # Here, since it takes a while.
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    words = WORDS[3:]
    texts = [
        " ".join(words[(i * j) % len(words)] for j in range(1, 4 + i % 5)) for i in range(1, 41)
    ]
    trainer = SFTTrainer(
        model=llama(settings.pop("dtype", torch.float64)),
        args=arguments(folder, count, SFTConfig, **settings),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tiny_tokenizer(),
    )
    mask_trainer(trainer, FishConfig(keep_ratio=0.3), progress=False)
    return trainer


FLOWS = {"FishTuningTrainer": masked_by_itself, "callback": masked_before, "SFTTrainer": of_trl}


def trained(
    rank: int, flow: str, folder: Path, count: int, settings: Any, resume: Any = None
) -> Any:
    """Train, save, and return the trained tensors, the mask and whether the model is divided."""
    let_accelerate_divide_on_cpus()
    torch.manual_seed(0)
    settings = dict(settings)
    callbacks = settings.pop("callbacks", [])
    trainer = FLOWS[flow](folder, count, settings)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    if "SHARDED" in str(settings):
        # Of these, a Trainer saves checkpoints alone.
        trainer.model.save_pretrained(folder / "saved", is_main_process=rank == 0)
    else:
        trainer.save_model(str(folder / "saved"))
    mask = get_mask(trainer.model)
    return tensors_of(trainer.model, mask), mask, is_sharded(trainer.model)
