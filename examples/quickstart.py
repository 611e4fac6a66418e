"""LoRA against LoRA-FISH at the same exact budget, on a real model and real text.

Fine-tunes MiniLM to tell which package a sentence of documentation comes from. Both arms start
from the same base weights and head, see the same batches in the same order at the same learning
rate, and train the same number of scalars, the classification head included. LoRA trains all of
rank 8; LoRA-FISH trains the entries of rank 16 that score highest. Needs no network.

    pip install 'fish-tuning[quickstart]'
    python examples/quickstart.py
"""

import argparse
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# Read when the libraries are imported: a quickstart shows its own lines only.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from datasets import DatasetDict, disable_progress_bars
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fish_tuning import FishConfig, get_fish_model
from fish_tuning.experiments.installed_text import load_installed_text
from fish_tuning.experiments.minilm import minilm_path

SEED = 0
LORA_RANK, FISH_RANK = 8, 16
BATCH_SIZE = 16
MAX_TOKENS = 32


@dataclass
class Result:
    """What one arm measured."""

    arm: str
    accuracy: float
    trainable: int
    score_seconds: float | None
    train_seconds: float


class ProgressLine(TrainerCallback):
    """One line that moves: the arm, its steps, the time left."""

    def __init__(self, progress: Progress, arm: str) -> None:
        self.progress = progress
        self.task = progress.add_task(arm, total=None)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.progress.update(self.task, completed=state.global_step, total=state.max_steps)


def build_model(folder: Path, labels: list[str], rank: int) -> PeftModel:
    """Build MiniLM with a fresh head and LoRA on query, key and value."""
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["query", "key", "value"],
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, config)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of sentences whose package was named."""
    hits = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(np.mean(hits))}


def train(
    arm: str,
    model: PeftModel,
    data: DatasetDict,
    collator: DataCollatorWithPadding,
    options: argparse.Namespace,
    progress: Progress,
    score_seconds: float | None = None,
) -> Result:
    """Train one arm with transformers' Trainer and measure it."""
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                learning_rate=options.learning_rate,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=BATCH_SIZE,
                per_device_eval_batch_size=8 * BATCH_SIZE,
                warmup_steps=20,
                seed=SEED,
                data_seed=SEED,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=collator,
            compute_metrics=accuracy,
            callbacks=[ProgressLine(progress, arm)],
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        train_seconds = time.perf_counter() - start
        assert trainer.optimizer is not None
        held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
        measured = trainer.evaluate()["eval_accuracy"]
    return Result(arm, measured, held, score_seconds, train_seconds)


def main() -> None:
    """Run both arms and print what they measured."""
    parser = argparse.ArgumentParser(description="LoRA against LoRA-FISH at the same budget.")
    parser.add_argument("--per-class", type=int, default=300, help="training sentences a class")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of both arms")
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    console = Console()

    folder = minilm_path()
    with console.status("reading the documentation of installed packages"):
        text = load_installed_text(per_class=options.per_class, seed=SEED)
    labels = text["train"].features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = text.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=MAX_TOKENS),
        batched=True,
        remove_columns="text",
    )
    collator = DataCollatorWithPadding(tokenizer)
    console.print(
        f"MiniLM-L6, {len(labels)} packages: {', '.join(labels)}; "
        f"{len(data['train'])} training and {len(data['validation'])} validation sentences"
    )

    columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.completed}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        lora = build_model(folder, labels, LORA_RANK)
        budget, _ = lora.get_nb_trainable_parameters()
        results = [train("LoRA", lora, data, collator, options, progress)]

        fish = build_model(folder, labels, FISH_RANK)
        calibration = DataLoader(
            data["train"].with_format("torch"), batch_size=BATCH_SIZE, collate_fn=collator
        )
        start = time.perf_counter()
        fish = get_fish_model(fish, FishConfig(num_trainable=budget, seed=SEED), calibration)
        score_seconds = time.perf_counter() - start
        results.append(train("LoRA-FISH", fish, data, collator, options, progress, score_seconds))

    table = Table(title=f"Learning rate {options.learning_rate:g}, seed {SEED}")
    table.add_column("arm")
    for heading in ("accuracy", "trainable scalars", "scoring (s)", "training (s)"):
        table.add_column(heading, justify="right")
    for result in results:
        scoring = "-" if result.score_seconds is None else f"{result.score_seconds:.1f}"
        table.add_row(
            result.arm,
            f"{result.accuracy:.4f}",
            f"{result.trainable:,}",
            scoring,
            f"{result.train_seconds:.1f}",
        )
    console.print(table)
    console.print(
        "One seed: read the table as a demonstration, not as a result. "
        "Trainable scalars are counted in the optimizer, the head included."
    )


if __name__ == "__main__":
    main()
