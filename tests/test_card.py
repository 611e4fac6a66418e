"""The model card of a masked model: what it says, what it keeps, and that hubs get it."""

import logging
from pathlib import Path

import pytest
import torch
import transformers.trainer
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments
from transformers.utils import hub

from fish_tuning import (
    FishConfig,
    FishMask,
    FishTuningCallback,
    FishTuningTrainer,
    apply_mask,
    get_fish_model,
    remove_mask,
)
from fish_tuning.card import write_card

from .models import OLD_TRANSFORMERS, batches_of, examples_for, tiny_bert, with_lora

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
    assert f"{counts} of {len(mask)} tensors are trained, 2 of the tensors whole" in card.text
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
    assert "4 of 6 entries (66.67%) of 2 tensors are trained, 1 of the tensors whole" in text
    assert "300 of" not in text and "setting" not in text
    assert load(tmp_path).data.tags.count("fish-tuning") == 1


def test_what_the_card_says_already_stays(tmp_path):
    """Guards the words, metadata and tags of whoever wrote the card."""
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
    """Guards a card where nobody else writes one, without PEFT in how to load it."""
    model = apply_mask(tiny_bert(), {"classifier.bias": torch.tensor([True, False, True])})
    model.save_pretrained(tmp_path)
    card = load(tmp_path)
    assert card.data.tags == ["fish-tuning"]
    assert "2 of 3 entries" in card.text and "PeftModel" not in card.text
    remove_mask(model).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()


class Uploads:
    """Stands for the hub: keeps the text of what would be uploaded."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **kwargs):
        return type("Repository", (), {"repo_id": repo_id})

    def create_commit(self, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()

    def upload_folder(self, folder_path, **kwargs):
        for file in Path(folder_path).iterdir():
            if file.is_file():
                self.files[file.name] = file.read_bytes()


@pytest.fixture
def uploads(monkeypatch):
    """A hub whose repository has a card of its own."""
    if OLD_TRANSFORMERS:
        pytest.skip("the hub is reached through other functions before transformers 5")
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
    card = ModelCard(uploads.files["README.md"].decode())
    assert uploads.files.keys() >= MASK_FILES
    assert card.data.license == "mit" and card.data.tags == ["fish-tuning"]
    assert "# Our model" in card.text and card.text.count("## FISH-Tuning") == 1


def arguments(folder):
    return TrainingArguments(
        str(folder), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )


def test_trainers_card_and_push(uploads, tmp_path):
    """Guards against the Trainer's card, which replaces the model's own."""
    model = masked_bert()
    trainer = FishTuningTrainer(model, arguments(tmp_path), train_dataset=examples_for(model, 4))
    trainer.hub_model_id = "somebody/a-model"
    trainer.push_to_hub()
    card = ModelCard(uploads.files["README.md"].decode())
    assert uploads.files.keys() >= MASK_FILES
    assert card.data.library_name == "peft" and "fish-tuning" in card.data.tags
    assert "Training hyperparameters" in card.text and card.text.count("## FISH-Tuning") == 1


def test_any_trainer_saves_the_card(tmp_path):
    """Guards checkpoints of other Trainers, whose models say themselves what is masked."""
    model = with_lora(tiny_bert())
    mask = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(model, arguments(tmp_path), callbacks=[FishTuningCallback(mask)])
    trainer.save_model(tmp_path / "saved")
    assert "fish-tuning" in load(tmp_path / "saved").data.tags
