"""Tiny Trainers of every kind, and the loop over their own loss that scores are compared with."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from fish_tuning import FishConfig
from tests.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, with_lora
from tests.training import arguments, data_for, tiny_tokenizer

ALL = FishConfig(keep_ratio=0.4, num_samples=None, scoring_point="start")
"""Scores of all examples at the model as it is."""

TEXTS = [
    "the fish swims up the river",
    "the fish swims down again",
    "up the river",
    "down the river and up again and again",
    "and the fish",
    "swims",
]
PROMPTS = ["the fish", "the river", "down", "up and up", "again", "the"]
CHOSEN = [" swims up", " and the fish", " again", " the river", " up", " fish swims down"]
REJECTED = [" down again", " swims", " the river up", " up", " and", " river up again and again"]


class Weighted(Trainer):
    """The usual subclass: a loss with class weights."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weights = torch.tensor([0.2, 1.0, 3.0])
        losses = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        loss = (weights[labels] * losses).mean()
        self.log({"weighted": float(loss)})
        return (loss, outputs) if return_outputs else loss


def token_loss(outputs, labels, num_items_in_batch):
    """A compute_loss_func that needs the number of tokens."""
    losses = nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    return losses.square().sum() / num_items_in_batch


def bert(**config):
    model = tiny_bert(hidden_dropout_prob=0.3, **config)
    return with_lora(model, init_lora_weights=False)


def causal(build=tiny_llama):
    sizes = {"n_positions": 64} if build is tiny_gpt2 else {"max_position_embeddings": 64}
    return with_lora(build(**sizes), init_lora_weights=False)


def plain(folder, kind=Trainer, model=None, args=None, **options):
    model = bert() if model is None else model
    options.setdefault("train_dataset", data_for(model, 8))
    return kind(model=model, args=arguments(folder, **(args or {})), **options)


def seq2seq(folder, **args):
    model = with_lora(tiny_t5(), init_lora_weights=False)
    data = [row | {"labels": row["labels"][:2]} for row in data_for(model, 8)]
    settings = arguments(folder, Seq2SeqTrainingArguments, **args)
    # It makes the decoder's inputs, which label smoothing needs.
    collator = DataCollatorForSeq2Seq(tiny_tokenizer(), model=model)
    return Seq2SeqTrainer(model=model, args=settings, train_dataset=data, data_collator=collator)


def trl_trainer(name, folder, columns, model=None, args=None, train_dataset=None, **options):
    trl = pytest.importorskip("trl")
    settings = {"max_length": 24, "bf16": False, **(args or {})}
    return getattr(trl, f"{name}Trainer")(
        model=causal() if model is None else model,
        args=arguments(folder, getattr(trl, f"{name}Config"), **settings),
        train_dataset=train_dataset or Dataset.from_dict(columns),
        processing_class=tiny_tokenizer(),
        **options,
    )


def sft(folder, **options):
    return trl_trainer("SFT", folder, {"text": TEXTS}, **options)


def completions(folder, **options):
    return trl_trainer("SFT", folder, {"prompt": PROMPTS, "completion": CHOSEN}, **options)


def dpo(folder, **options):
    columns = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    return trl_trainer("DPO", folder, columns, **options)


def dpo_new_adapter(folder, **options):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = tiny_llama(max_position_embeddings=64)
    return dpo(folder, model=model, peft_config=lora, **options)


def reward(folder, **options):
    columns = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    model = tiny_llama("SequenceClassification", num_labels=1, max_position_embeddings=64)
    model = with_lora(model, init_lora_weights=False)
    return trl_trainer("Reward", folder, columns, model=model, **options)


def kto(folder, **options):
    columns = {"prompt": PROMPTS, "completion": CHOSEN, "label": [True, False] * 3}
    return trl_trainer("KTO", folder, columns, **options)


def sentence_encoder(folder):
    st = pytest.importorskip("sentence_transformers")
    path = str(folder / "bert")
    tiny_bert(task="MaskedLM").bert.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    model = st.SentenceTransformer(path, device="cpu")  # With mean pooling.
    settings = {"target_modules": ["query", "value"], "init_lora_weights": False}
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, task_type="FEATURE_EXTRACTION", **settings))
    return model


def sentence_trainer(folder, loss, columns, **options):
    st = pytest.importorskip("sentence_transformers")
    model = sentence_encoder(folder)
    return st.SentenceTransformerTrainer(
        model=model,
        args=arguments(folder, st.SentenceTransformerTrainingArguments),
        train_dataset=Dataset.from_dict(columns),
        loss=loss(st.sentence_transformer.losses, model),
        **options,
    )


PAIRS = {"first": TEXTS, "second": TEXTS[1:] + TEXTS[:1]}
TRIPLES = {**PAIRS, "third": TEXTS[2:] + TEXTS[:2]}
SCORED_PAIRS = {**PAIRS, "label": [0.1, 0.9, 0.4, 0.0, 1.0, 0.3]}


def sentences(loss, columns):
    return lambda folder: sentence_trainer(folder, loss, columns)


TRAINERS = {
    "plain": plain,
    "label-smoothing": lambda folder: plain(folder, args={"label_smoothing_factor": 0.2}),
    "subclass": lambda folder: plain(folder, Weighted),
    "compute-loss-func": lambda folder: plain(folder, model=causal(), compute_loss_func=token_loss),
    "language-model": lambda folder: plain(folder, model=causal(tiny_gpt2)),
    "language-model-smoothing": lambda folder: plain(
        folder, model=causal(tiny_gpt2), args={"label_smoothing_factor": 0.2}
    ),
    "seq2seq": seq2seq,
    "seq2seq-smoothing": lambda folder: seq2seq(folder, label_smoothing_factor=0.1),
    "sft": sft,
    "sft-completions": completions,
    "sft-dft": lambda folder: sft(folder, args={"loss_type": "dft"}),
    "dpo": dpo,
    "dpo-new-adapter": dpo_new_adapter,
    "reward": reward,
    "kto": kto,
    "cosine": sentences(lambda losses, model: losses.CosineSimilarityLoss(model), SCORED_PAIRS),
    "triplet": sentences(lambda losses, model: losses.TripletLoss(model), TRIPLES),
    "negatives": sentences(
        lambda losses, model: losses.MultipleNegativesRankingLoss(model), TRIPLES
    ),
}
"""A Trainer of every kind, by name: functions of the folder it writes into."""


def own_loss_scores(trainer: Any) -> dict[str, Tensor]:
    """The mean squared gradient of the Trainer's own loss, one example at a time."""
    loader = trainer.get_train_dataloader()
    model = trainer.model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    rows = [loader.dataset[i] for i in range(len(loader.dataset))]
    for row in rows:
        inputs = trainer._prepare_inputs(loader.collate_fn([row]))
        options = {}
        if trainer.compute_loss_func is token_loss:
            options = {"num_items_in_batch": inputs["labels"][:, 1:].ne(-100).sum()}
        loss = trainer.compute_loss(model, inputs, **options)
        gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.square()
    for module, mode in modes.items():
        module.training = mode
    return {name: total / len(rows) for name, total in sums.items()}
