"""Models, masks and Trainer's arguments for tests of training, and a run that is killed."""

import os
import signal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from fish_tuning import FishTuningTrainer
from tests.models import examples_for, tiny_bert, with_lora

HEAD = "modules_to_save"
STEPS, KILLED_AT = 6, 3


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_mask(model, density=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(p.shape, dtype=torch.bool)
        if HEAD in name
        else torch.rand(p.shape, generator=generator) < density
        for name, p in trainable(model).items()
    }


def tensor_of(model, name):
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute).detach()


def tensors_of(model, names):
    return {name: tensor_of(model, name).clone() for name in names}


def assert_trained_where_selected(model, mask, before):
    """Check that frozen entries kept their bits and that nearly all selected ones changed."""
    selected = changed = 0
    for name, bits in mask.items():
        now, old = tensor_of(model, name), before[name]
        assert torch.equal(now[~bits].view(torch.int32), old[~bits].view(torch.int32)), name
        selected += int(bits.sum())
        changed += int((now != old)[bits].sum())
    assert changed > 0.9 * selected > 0


def lora_bert(dropout=True):
    rates = (
        {} if dropout else dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0)
    )
    return with_lora(
        tiny_bert(**rates), init_lora_weights=False, lora_dropout=0.1 if dropout else 0.0
    )


def data_for(model, n=12):
    return examples_for(model, n, shortest=6, longest=6)


def arguments(folder, kind=TrainingArguments, **settings):
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 100,
    }
    return kind(**{**defaults, **settings})


def trainer_for(model, folder, mask=None, callbacks=None, **settings):
    return FishTuningTrainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data_for(model),
        eval_dataset=data_for(model),
        mask=mask,
        callbacks=callbacks,
    )


WORDS = ["<pad>", "<eos>", "<unk>", "the", "fish", "swims", "up", "river", "and", "down", "again"]


def tiny_tokenizer():
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


class Classifier(nn.Module):
    """A plain module with the interface that Trainer needs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.last(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def points():
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=generator), "labels": i % 3} for i in range(12)]


class Kill(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def checkpointed_run(folder, callbacks=None, resume=None):
    torch.manual_seed(0)
    model = lora_bert()
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS}
    trainer = trainer_for(model, folder, random_mask(model), callbacks, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return model
