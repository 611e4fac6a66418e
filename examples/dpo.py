"""Preference tuning (DPO): the adapter is switched off to compute the reference."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from fish_tuning import FishConfig, mask_trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized")
parser.add_argument("--output", default="output/dpo")
parser.add_argument("--max-steps", type=int, default=-1)
args = parser.parse_args()

trainer = DPOTrainer(
    args.model,
    args=DPOConfig(
        args.output,
        max_steps=args.max_steps,
        learning_rate=1e-3,
        bf16=torch.cuda.is_available(),  # TRL's default, True, needs an accelerator.
    ),
    train_dataset=load_dataset(args.dataset, split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
)
# One example is a pair of answers: DPO's own loss of each pair is scored.
mask = mask_trainer(trainer, FishConfig(keep_ratio=0.05, num_samples=64))
print(mask.summary())
trainer.train()
trainer.save_model()
