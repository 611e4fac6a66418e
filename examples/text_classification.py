"""Text classification: train 5% of a LoRA, chosen by Fisher information."""

import argparse

from datasets import load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from fish_tuning import FishConfig, mask_trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="google-bert/bert-base-uncased")
parser.add_argument("--dataset", default="stanfordnlp/sst2", help="columns: sentence and label")
parser.add_argument("--output", default="output/classifier")
parser.add_argument("--max-steps", type=int, default=-1)
args = parser.parse_args()


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Fraction of correct predictions."""
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


tokenizer = AutoTokenizer.from_pretrained(args.model)
data = load_dataset(args.dataset).map(
    lambda rows: tokenizer(rows["sentence"], truncation=True), batched=True
)
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=16))

trainer = Trainer(
    model,
    TrainingArguments(
        args.output, max_steps=args.max_steps, learning_rate=1e-2, eval_strategy="epoch"
    ),
    train_dataset=data["train"],
    eval_dataset=data["validation"],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=accuracy,
)
mask = mask_trainer(trainer, FishConfig(keep_ratio=0.05))
print(mask.summary())
trainer.train()
print(trainer.evaluate())
trainer.save_model()
