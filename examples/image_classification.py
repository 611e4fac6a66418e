"""Image classification with a vision transformer."""

import argparse
from typing import Any

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)

from fish_tuning import FishConfig, mask_trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="google/vit-base-patch16-224-in21k")
parser.add_argument("--dataset", default="ethz/food101", help="columns: image and label")
parser.add_argument("--split", default="train[:5000]")
parser.add_argument("--output", default="output/images")
parser.add_argument("--max-steps", type=int, default=-1)
args = parser.parse_args()

processor = AutoImageProcessor.from_pretrained(args.model)


def to_pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Turn images into the model's input, when they are read."""
    images = [image.convert("RGB") for image in rows["image"]]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": rows["label"]}


data = load_dataset(args.dataset, split=args.split)
model = AutoModelForImageClassification.from_pretrained(
    args.model, num_labels=len(data.features["label"].names)
)
lora = LoraConfig(
    r=16,
    target_modules="all-linear",
    exclude_modules=["classifier"],
    modules_to_save=["classifier"],  # The new head is trained in full.
)
trainer = Trainer(
    get_peft_model(model, lora),
    TrainingArguments(
        args.output, max_steps=args.max_steps, learning_rate=1e-2, remove_unused_columns=False
    ),
    train_dataset=data.with_transform(to_pixels),
)
mask = mask_trainer(trainer, FishConfig(keep_ratio=0.05))
print(mask.summary())
trainer.train()
trainer.save_model()
