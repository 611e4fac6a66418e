"""FISH Mask: train 0.5% of a model's own linear weights, and save them as a PEFT adapter."""

import argparse

import torch
from datasets import load_dataset
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from fish_tuning import FishConfig, mask_trainer, save_as_peft_adapter

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--dataset", default="trl-lib/Capybara", help="column: messages")
parser.add_argument("--output", default="output/base_weights")
parser.add_argument("--max-steps", type=int, default=-1)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
model.requires_grad_(False)
for name, module in model.named_modules():
    if isinstance(module, nn.Linear) and name != "lm_head":
        module.weight.requires_grad_(True)

trainer = SFTTrainer(
    model,
    SFTConfig(
        f"{args.output}/checkpoints",
        max_steps=args.max_steps,
        learning_rate=1e-4,
        bf16=torch.cuda.is_available(),  # TRL's default, True, needs an accelerator.
    ),
    train_dataset=load_dataset(args.dataset, split="train"),
)
# Of the same density in all layers, they fit into one adapter of PEFT's Super-Tuning.
config = FishConfig(keep_ratio=0.005, scope="per_tensor", scoring_point="start")
print(mask_trainer(trainer, config).summary())
trainer.train()
[folder] = save_as_peft_adapter(model, f"{args.output}/adapter", start=before)

# From here on, only PEFT is needed.
base = AutoModelForCausalLM.from_pretrained(args.model)
merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
