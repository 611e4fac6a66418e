"""The model card of a masked model: what it says, what it keeps, and that hubs get it."""

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from datasets import Dataset
from huggingface_hub import ModelCard
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.utils import hub

from fish_tuning import (
    FishConfig,
    FishMask,
    FishTuningCallback,
    FishTuningTrainer,
    apply_mask,
    get_fish_model,
    get_mask,
    remove_mask,
)
from fish_tuning.mask.card import write_card
from tests.models import batches_of, examples_for, tiny_bert, tiny_llama, tiny_t5, with_lora
from tests.training import tiny_tokenizer

SETTINGS = {
    "num_trainable": 300,
    "num_samples": 7,
    "scope": "balanced",
    "criterion": "fisher",
    "scoring_point": "perturbed",
}
MASK_FILES = {"fish_mask.json", "fish_mask.safetensors"}


def masked_bert():
    model = with_lora(tiny_bert())
    loader = batches_of(examples_for(model, 8), 4)
    return get_fish_model(model, FishConfig(**SETTINGS), loader, progress=False)


def small_mask(**provenance):
    bits = {"a": torch.tensor([True, False, False, True]), "b": torch.ones(2, dtype=torch.bool)}
    return FishMask(bits, provenance=provenance)


def load(folder):
    return ModelCard.load(Path(folder) / "README.md")


def test_card_of_an_adapter(tmp_path):
    """Guards what the card says, and PEFT's own part of it."""
    masked_bert().save_pretrained(tmp_path)
    card, mask = load(tmp_path), FishMask.from_pretrained(tmp_path)
    assert card.data.library_name == "peft"
    assert {"fish-tuning", "lora"} <= set(card.data.tags)
    assert "### Framework versions" in card.text
    counts = f"300 of {mask.num_entries:,} entries ({300 / mask.num_entries:.2%})"
    assert f"{counts} of {len(mask)} tensors are trained, 2 of the tensors densely" in card.text
    assert "(https://arxiv.org/abs/2504.04050)" in card.text
    for name, value in SETTINGS.items():
        assert f"| {name} | `{value}` |" in card.text
    assert "PeftModel.from_pretrained(base_model, source, is_trainable=True)" in card.text
    assert "apply_mask(model, FishMask.from_pretrained(source))" in card.text


def test_saving_again_replaces_the_section(tmp_path):
    """Guards against a section for every save, of masks long gone."""
    model = masked_bert()
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_bytes()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == first
    write_card(tmp_path, small_mask())
    text = load(tmp_path).text
    assert text.count("## FISH-Tuning") == 1
    assert "4 of 6 entries (66.67%) of 2 tensors are trained, 1 of the tensors densely" in text
    assert "300 of" not in text and "setting" not in text
    assert load(tmp_path).data.tags.count("fish-tuning") == 1


def test_what_the_card_says_already_stays(tmp_path):
    """Guards the text, metadata and tags of the card's author."""
    card = "---\nlicense: mit\ntags:\n- ours\n---\n\n# Our model\n\nIt swims.\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    for _ in range(2):
        write_card(tmp_path, small_mask(names_to_exclude=["a|b"], seed=None))
    card = load(tmp_path)
    assert card.data.to_dict() == {"license": "mit", "tags": ["ours", "fish-tuning"]}
    assert card.text.strip().startswith("# Our model\n\nIt swims.\n\n<!-- fish-tuning")
    assert r'| names_to_exclude | `["a\|b"]` |' in card.text
    assert "seed" not in card.text


@pytest.mark.parametrize("metadata", ["a: [", "- a list"])
def test_a_card_that_cannot_be_read_is_left_alone(metadata, tmp_path, caplog):
    """Guards against a model that is not saved because of its description."""
    broken = f"---\n{metadata}\n---\n\n# Our model\n"
    (tmp_path / "README.md").write_text(broken, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="fish_tuning"):
        apply_mask(model := tiny_bert(), {"classifier.bias": torch.tensor([True, False, True])})
        model.save_pretrained(tmp_path)
    assert "its metadata cannot be read" in caplog.text
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == broken
    assert {file.name for file in tmp_path.iterdir()} >= MASK_FILES


def test_a_models_own_weights(tmp_path):
    """Guards the card when nothing else writes one, without PEFT in its loading code."""
    model = apply_mask(tiny_bert(), {"classifier.bias": torch.tensor([True, False, True])})
    model.save_pretrained(tmp_path)
    card = load(tmp_path)
    assert card.data.tags == ["fish-tuning"]
    assert "2 of 3 entries" in card.text and "PeftModel" not in card.text
    remove_mask(model).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()


class Uploads:
    """Replaces the hub: keeps the text of what would be uploaded."""

    def __init__(self):
        self.files, self.messages = {}, []

    def create_repo(self, repo_id, **kwargs):
        return type("Repository", (), {"repo_id": repo_id})

    def create_commit(self, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()

    def upload_folder(self, folder_path, commit_message=None, **kwargs):
        self.messages.append(commit_message)
        for file in Path(folder_path).iterdir():
            if file.is_file():
                self.files[file.name] = file.read_bytes()
        done = Future()
        done.set_result(None)
        return done


@pytest.fixture
def uploads(monkeypatch):
    """A hub whose repository has a card of its own."""
    uploads = Uploads()
    for module in (hub, transformers.modeling_utils):
        monkeypatch.setattr(
            module,
            "create_and_tag_model_card",
            lambda *args, **kwargs: ModelCard("---\nlicense: mit\n---\n\n# Our model\n"),
        )
    for module in (hub, transformers.modeling_utils, transformers.trainer):
        monkeypatch.setattr(module, "hf_api", lambda *args, **kwargs: uploads)
    return uploads


@pytest.mark.parametrize("kind", ["adapter", "own-weights", "own-weights-while-saving"])
def test_push_to_hub_uploads_mask_and_card(kind, uploads, tmp_path):
    """Guards against the repository's old card, which push_to_hub lays over the saved one."""
    if kind == "adapter":
        model = masked_bert()
    else:
        model = apply_mask(tiny_bert(), {"classifier.bias": torch.tensor([True, False, True])})
    if kind == "own-weights-while-saving":
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="somebody/a-model")
    else:
        model.push_to_hub("somebody/a-model")
    card: Any = ModelCard(uploads.files["README.md"].decode())
    assert uploads.files.keys() >= MASK_FILES
    assert card.data.license == "mit" and card.data.tags == ["fish-tuning"]
    assert "# Our model" in card.text and card.text.count("## FISH-Tuning") == 1


def arguments(folder, kind=TrainingArguments, **settings):
    shared = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return kind(str(folder), **shared, **settings)


def masked_by_callback(model):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    bits = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    for tensor in bits.values():
        tensor.view(-1)[::2] = True
    return {"model": model, "callbacks": [FishTuningCallback(FishMask(bits, provenance=SETTINGS))]}


def sft_trainer(folder, **options):
    trl = pytest.importorskip("trl")
    settings = {"max_length": 16, "bf16": False, "gradient_checkpointing": False}
    return trl.SFTTrainer(
        args=arguments(folder, trl.SFTConfig, **settings),
        train_dataset=Dataset.from_dict({"text": ["the fish swims up the river"] * 4}),
        processing_class=tiny_tokenizer(),
        **options,
    )


def trainer_of(kind, folder):
    """A Trainer of each kind over a model that is masked before, or by the callback."""
    if kind == "sft":
        model = with_lora(tiny_llama(max_position_embeddings=64), init_lora_weights=False)
        return sft_trainer(folder, **masked_by_callback(model))
    if kind == "own weights":
        model = apply_mask(tiny_bert(), {"classifier.bias": torch.tensor([True, False, True])})
        return Trainer(model, arguments(folder), train_dataset=examples_for(model, 4))
    if kind == "seq2seq":
        settings = arguments(folder, Seq2SeqTrainingArguments)
        model = with_lora(tiny_t5())
        data = examples_for(model, 4, shortest=6, longest=6)
        data = [example | {"labels": example["labels"][:2]} for example in data]
        return Seq2SeqTrainer(args=settings, train_dataset=data, **masked_by_callback(model))
    trainer_class = FishTuningTrainer if kind == "ours" else Trainer
    model = masked_bert()
    return trainer_class(model, arguments(folder), train_dataset=examples_for(model, 4))


KINDS = ["ours", "plain", "own weights", "seq2seq", "sft"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_trainers_card_and_push(kind, uploads, tmp_path):
    """Guards against the Trainer's card, which replaces the model's own and is uploaded at once."""
    trainer = trainer_of(kind, tmp_path)
    trainer.hub_model_id = "somebody/a-model"
    trainer.push_to_hub()
    card: Any = ModelCard(uploads.files["README.md"].decode())
    assert uploads.files.keys() >= MASK_FILES
    assert FishMask.from_pretrained(tmp_path) == get_mask(trainer.model)
    assert "fish-tuning" in card.data.tags and card.text.count("## FISH-Tuning") == 1
    said = "Training procedure" if kind == "sft" else "Training hyperparameters"
    assert said in card.text
    assert ("PeftModel.from_pretrained" in card.text) == (kind != "own weights")
    if kind not in ("own weights", "sft"):
        assert card.data.library_name == "peft"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_create_model_card(kind, tmp_path):
    """Guards the card of a Trainer that is asked for nothing else, twice."""
    trainer = trainer_of(kind, tmp_path)
    for _ in range(2):
        trainer.create_model_card(model_name="ours")
    card, mask = load(tmp_path), get_mask(trainer.model)
    assert f"{mask.num_trainable:,} of {mask.num_entries:,} entries" in card.text
    assert card.text.count("## FISH-Tuning") == 1 and "ours" in card.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["seq2seq", "sft"])
def test_uploads_while_training(kind, uploads, tmp_path):
    """Guards uploads of checkpoints, of which a Trainer gathers weights and configs alone."""
    trainer = trainer_of(kind, tmp_path)
    trainer.hub_model_id, trainer.args.push_to_hub = "somebody/a-model", True
    trainer.push_in_progress = None
    trainer.args.set_save("steps", 1)
    trainer.train()
    assert uploads.messages[0] == "Training in progress, step 1"
    card: Any = ModelCard(uploads.files["README.md"].decode())
    assert uploads.files.keys() >= {*MASK_FILES, "adapter_model.safetensors"}
    assert "PeftModel.from_pretrained" in card.text and card.text.count("## FISH-Tuning") == 1
    assert load(tmp_path / "checkpoint-1").text.count("## FISH-Tuning") == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_that_saves_keeps_the_users_card(kind, tmp_path):
    """Guards a model description that is in the folder before the model is saved there."""
    trainer = trainer_of(kind, tmp_path / "output")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Our model\n\nIt swims.\n")
    trainer.save_model(folder)
    card = load(folder)
    assert card.data.license == "mit" and "fish-tuning" in card.data.tags
    assert "# Our model\n\nIt swims.\n" in card.text
    assert card.text.count("## FISH-Tuning") == 1


def test_trainers_of_models_without_a_mask(tmp_path):
    """Guards the cards of others in the same process."""
    model = masked_bert()
    remove_mask(model)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=examples_for(model, 4))
    trainer.create_model_card()
    assert "Training hyperparameters" in load(tmp_path).text
    assert "fish" not in (tmp_path / "README.md").read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"README.md"}


def test_trainers_that_are_imported_later(uploads, tmp_path):
    """Guards a card of a class that was not there yet when the model was masked."""
    model = masked_bert()

    class Later(Trainer):
        def create_model_card(self, **kwargs):
            (tmp_path / "README.md").write_text("# Another card\n")

    trainer = Later(model, arguments(tmp_path), train_dataset=examples_for(model, 4))
    trainer.hub_model_id = "somebody/a-model"
    trainer.push_to_hub()
    card: Any = ModelCard(uploads.files["README.md"].decode())
    assert "# Another card" in card.text and "## FISH-Tuning" in card.text


class Bare(nn.Module):
    """Neither transformers' nor PEFT's: a Trainer writes its weights alone."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)

    def forward(self, x, labels):
        return {"loss": self.lin(x).square().mean()}


def test_checkpoints_of_other_models(tmp_path):
    """Guards a mask that is lost where there is no save_pretrained to bring it along."""
    options = masked_by_callback(Bare())
    data = [{"x": torch.ones(2), "labels": torch.tensor(0)}] * 4
    trainer = Trainer(args=arguments(tmp_path), train_dataset=data, **options)
    trainer.train()
    assert FishMask.from_pretrained(tmp_path / "checkpoint-1") == get_mask(trainer.model)
    assert "3 of 6 entries" in load(tmp_path / "checkpoint-1").text
