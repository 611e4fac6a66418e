"""TrainerExamples: what is drawn from a Trainer's data."""

import itertools
import logging

import datasets
import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, Trainer

from fish_tuning import FishConfig, get_fish_model, get_mask, mask_trainer
from fish_tuning.from_trainer.examples import TrainerExamples
from fish_tuning.from_trainer.masking import score_trainer
from tests.from_trainer.trainers import ALL, PROMPTS, TEXTS, bert, own_loss_scores, plain, sft
from tests.models import assert_scores_close, pad, tiny_bert, with_lora
from tests.training import arguments, data_for, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


def drawn(trainer, num_samples=3, seed=0, one_at_a_time=False):
    examples = TrainerExamples(trainer, num_samples, seed, one_at_a_time=one_at_a_time)
    with torch.random.fork_rng(devices=[]):
        return list(examples)


def numbers(trainer, **options):
    """Which of the Trainer's examples were drawn, in the order drawn."""
    rows = [row["input_ids"].tolist() for row in trainer.train_dataset]
    batches = drawn(trainer, **options)
    return [rows.index(row) for batch in batches for row in batch["input_ids"].tolist()]


def test_the_draw(tmp_path):
    """Guards a draw that repeats examples, ignores its seed, or is not random."""
    trainer = plain(tmp_path, train_dataset=data_for(bert(), 40))
    first, again, other = (numbers(trainer, num_samples=9, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert len(set(first)) == len(first) == 9
    assert sorted(first) != sorted(other)
    assert max(first) > 9
    assert numbers(trainer, num_samples=None) == numbers(trainer, num_samples=99) == [*range(40)]
    sizes = [len(batch["labels"]) for batch in drawn(trainer, num_samples=9)]
    assert sizes == [4, 4, 1]  # As in training.


def test_scored_are_the_drawn_examples(tmp_path):
    """Guards scores of more examples than num_samples, or of others."""
    trainer = plain(tmp_path)
    config = FishConfig(keep_ratio=0.3, num_samples=3)
    rows = [trainer.train_dataset[number] for number in numbers(trainer)]
    mask = mask_trainer(trainer, config, progress=False)
    assert mask == get_mask(get_fish_model(bert(), config, [pad(rows)], progress=False))


def texts_with_more_columns():
    tokenizer = tiny_tokenizer()
    columns = {"text": TEXTS, "label": [0, 1, 2] * 2, "number": [*range(6)]}
    return Dataset.from_dict(columns).map(lambda row: dict(tokenizer(row["text"])))


@pytest.mark.parametrize("streamed", [False, True])
def test_unused_columns_are_removed(streamed, tmp_path):
    """Guards a collator that gets columns it cannot pad."""
    data = texts_with_more_columns()
    data = data.to_iterable_dataset() if streamed else data
    model = with_lora(tiny_bert(), init_lora_weights=False)
    options = {"train_dataset": data, "processing_class": tiny_tokenizer()}
    trainer = plain(tmp_path, model=model, **options)
    batch = drawn(trainer)[0]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    mask_trainer(trainer, progress=False)
    trainer.train()


class Stream(IterableDataset):
    """Numbered examples that notes how often it has been started."""

    def __init__(self, rows):
        self.rows, self.started = rows, 0

    def __iter__(self):
        self.started += 1
        yield from self.rows


class OneShot(IterableDataset):
    def __init__(self, rows):
        self.iterator = iter(rows)

    def __iter__(self):
        return self.iterator


def test_a_stream(tmp_path, caplog):
    """Guards a stream that scoring reads on, and a random draw that is none."""
    rows = data_for(bert(), 8)
    stream = Stream(rows)
    trainer = plain(tmp_path, train_dataset=stream)
    with caplog.at_level(logging.WARNING):
        batches = drawn(trainer, num_samples=5)
    assert "its first 5 examples are scored" in caplog.text
    found = [row for batch in itertools.islice(batches, 1) for row in batch["input_ids"].tolist()]
    assert found == [row["input_ids"].tolist() for row in rows[:4]]
    mask_trainer(trainer, FishConfig(keep_ratio=0.5, num_samples=5), progress=False)
    assert stream.started == 0
    trainer.train()


def test_a_stream_of_datasets_starts_over(tmp_path):
    """Guards streamed data that training continues where scoring stopped."""
    columns = {"prompt": PROMPTS, "completion": PROMPTS}
    stream = Dataset.from_dict(columns).to_iterable_dataset().shuffle(seed=1, buffer_size=3)
    assert isinstance(stream, datasets.IterableDataset)

    def trainer():
        return sft(tmp_path, train_dataset=stream)

    def trained_on(trainer):
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    expected = trained_on(trainer())
    scored = trainer()
    mask_trainer(scored, FishConfig(keep_ratio=0.5, num_samples=3), progress=False)
    assert trained_on(scored) == expected


def test_a_stream_that_can_be_read_once_is_refused(tmp_path):
    """Guards examples that scoring takes away from training."""
    trainer = plain(tmp_path, train_dataset=OneShot(data_for(bert(), 8)))
    with pytest.raises(ValueError, match="can be read only once"):
        mask_trainer(trainer, progress=False)


@pytest.mark.parametrize("seed", [None, 4])
def test_random_collators(seed, tmp_path):
    """Guards masks that depend on the random numbers of a collator, and collators that go on."""

    def masked():
        tokenizer = tiny_tokenizer()
        tokenizer.mask_token = tokenizer.unk_token
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=seed)
        model = with_lora(tiny_bert(task="MaskedLM", vocab_size=11), init_lora_weights=False)
        rows = [{"input_ids": row} for row in tokenizer(TEXTS)["input_ids"]]
        trainer = Trainer(model, arguments(tmp_path), data_collator=collator, train_dataset=rows)
        if seed is not None:
            collator(rows)  # It has a generator now.
        state = None if seed is None else collator.generator.get_state()
        mask = mask_trainer(trainer, FishConfig(keep_ratio=0.2, num_samples=4), progress=False)
        assert seed is None or torch.equal(state, collator.generator.get_state())
        return mask

    first = masked()
    torch.rand(3)
    assert masked() == first


def test_labels_of_other_names(tmp_path):
    """Guards tasks whose labels are not called labels: question answering."""
    model = tiny_bert(2, task="QuestionAnswering")
    options = {"target_modules": ["query", "value"], "task_type": "QUESTION_ANS"}
    model = with_lora(model, init_lora_weights=False, **options)
    rows = data_for(bert(), 6)
    for number, row in enumerate(rows):
        del row["labels"]
        row |= {"start_positions": number % 3, "end_positions": 3 + number % 2}
    trainer = plain(tmp_path, model=model, train_dataset=rows)
    _, scores = score_trainer(trainer, ALL, progress=False)
    assert_scores_close(scores, own_loss_scores(trainer), rtol=1e-4)


class Warns(DataCollatorWithPadding):
    """Notes what it has warned of, as the collator of sentence-transformers does."""

    warned: set[tuple[str, ...]]

    def __call__(self, features):
        self.warned.add(tuple(features[0]))
        return super().__call__(features)


def test_collators_forget_what_they_saw(tmp_path):
    """Guards a warning that training would not give any more."""
    collator = Warns(tiny_tokenizer())
    collator.warned = set()
    trainer = plain(tmp_path, data_collator=collator)
    mask_trainer(trainer, progress=False)
    assert trainer.data_collator is collator
    assert collator.warned == set()
