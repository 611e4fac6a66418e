"""A training loop in plain PyTorch, which can be stopped and resumed."""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from fish_tuning import FishConfig, FishMask, apply_mask, get_fish_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="google-bert/bert-base-uncased")
parser.add_argument("--dataset", default="stanfordnlp/sst2", help="columns: sentence and label")
parser.add_argument("--output", default="output/plain_loop", type=Path)
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()
state_file = args.output / "state.pt"
device = "cuda" if torch.cuda.is_available() else "cpu"

tokenizer = AutoTokenizer.from_pretrained(args.model)
data = load_dataset(args.dataset, split="train")
data = data.map(lambda rows: tokenizer(rows["sentence"], truncation=True), batched=True)
data = data.select_columns(["input_ids", "attention_mask", "label"])
loader = DataLoader(
    data, batch_size=32, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)
)
torch.manual_seed(0)  # The new head and the adapter start alike when the script resumes.
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=16)).to(device)

# Mask first, and then build the optimizer. To resume, load the mask in place of scoring again.
if state_file.is_file():
    apply_mask(model, FishMask.from_pretrained(args.output))
else:
    get_fish_model(model, FishConfig(keep_ratio=0.05), loader)
model.print_trainable_parameters()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
first = 0
if state_file.is_file():
    state = torch.load(state_file, weights_only=True)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    first = state["epoch"]

model.train()
for epoch in range(first, args.epochs):
    for batch in loader:
        loss = model(**batch.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: the loss of the last batch is {loss.item():.4f}")
    model.save_pretrained(args.output)  # The adapter, for PEFT, and the mask beside it.
    torch.save(
        {
            "model": get_peft_model_state_dict(model),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
        },
        state_file,
    )
