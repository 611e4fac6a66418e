"""Experiments on models of known shapes, and the counts of their arms."""

from transformers import BertConfig

from fish_tuning.experiments.models.counts import count_parameters
from tests.experiments.tiny_experiment import experiment

BERT_TINY = BertConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
)


def of_model(config, folder, **changes):
    config.save_pretrained(folder)
    return experiment(folder, "unused.csv", "unused", **changes)


def trainable(config, num_labels):
    """Trainable parameters of every arm and ratio."""
    counts = count_parameters(config, num_labels)
    return {key: count.trainable for key, count in counts.items()}
