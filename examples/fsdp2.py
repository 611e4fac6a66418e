"""FSDP2: a language model sharded over processes.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from fish_tuning import FishConfig, get_fish_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--dataset", default="trl-lib/Capybara", help="column: messages")
parser.add_argument("--output", default="output/fsdp2")
parser.add_argument("--batch-size", type=int, default=4, help="of one process")
parser.add_argument("--epochs", type=int, default=1)
args = parser.parse_args()

if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = "cuda"
else:
    device = "cpu"
dist.init_process_group()

tokenizer = AutoTokenizer.from_pretrained(args.model)
data = load_dataset(args.dataset, split="train").map(
    lambda row: tokenizer.apply_chat_template(
        row["messages"], truncation=True, max_length=1024, return_dict=True
    ),
    remove_columns="messages",
)
data = data.select_columns(["input_ids", "attention_mask"])
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

torch.manual_seed(0)  # The adapter and the order of the data are the same in all processes.
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))

# Every process gets the complete data to score; they share the work. Mask, and then shard.
scored = DataLoader(data, args.batch_size, shuffle=True, collate_fn=collator)
get_fish_model(model, FishConfig(keep_ratio=0.05), scored)
for layer in model.get_base_model().model.layers:
    fully_shard(layer)
fully_shard(model)

trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
sampler = DistributedSampler(data)
loader = DataLoader(data, args.batch_size, sampler=sampler, collate_fn=collator)
model.train()
for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    for batch in loader:
        loss = model(**batch.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

# All processes share the values that the adapter is written from, so all of them take part.
model.save_pretrained(args.output, is_main_process=dist.get_rank() == 0)
dist.destroy_process_group()
