"""Supervised fine-tuning of a language model on chats, with LoRA or (--four-bit) QLoRA."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from fish_tuning import FishConfig, mask_trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--dataset", default="trl-lib/Capybara", help="column: messages")
parser.add_argument("--output", default="output/sft")
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--four-bit", action="store_true", help="quantize the base model (QLoRA)")
args = parser.parse_args()

options = {}
if args.four_bit:
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
trainer = SFTTrainer(
    args.model,
    SFTConfig(
        args.output,
        max_steps=args.max_steps,
        learning_rate=1e-2,
        bf16=torch.cuda.is_available(),  # TRL's default, True, needs an accelerator.
        model_init_kwargs=options,
    ),
    train_dataset=load_dataset(args.dataset, split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
)
mask = mask_trainer(trainer, FishConfig(keep_ratio=0.05))
print(mask.summary())
trainer.train()
trainer.save_model()
