"""Scoring with gradient checkpointing: the same scores, the memory of training, nothing left."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fish_tuning import calculate_fisher_information
from fish_tuning.per_example.gradients import PerExampleGradients
from fish_tuning.scoring.checkpointing import checkpointing

LAYERS = 6
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40}


def causal(checkpointed=False, **kwargs):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, pad_token_id=0, **SIZES))
    config = LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return _checkpointed(get_peft_model(base, config), checkpointed, kwargs)


def classifier(checkpointed=False, **kwargs):
    """With dropout that would show, and with learned positions, one row for the whole batch."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=2, hidden_dropout_prob=0.5, **SIZES)
    return _checkpointed(BertForSequenceClassification(config), checkpointed, kwargs)


def _checkpointed(model, checkpointed, kwargs):
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)
    return model.train()


def batches(per_token=True):
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in (3, 2):
        ids = torch.randint(1, 40, (size, 7), generator=generator)
        found.append({"input_ids": ids, "labels": ids if per_token else ids[:, 0] % 2})
    return found


def scores(model, per_token=True, **options):
    return calculate_fisher_information(model, batches(per_token), progress=False, **options)


def inputs_alive(model, monkeypatch):
    """How many of the inputs of LoRA's A are in memory when a backward pass begins, at most."""
    storages, alive = [], []
    for module in model.modules():
        if isinstance(module, nn.Module) and isinstance(module, LoraLayer):
            module.register_forward_pre_hook(
                lambda _, args: storages.append(weakref.ref(args[0].untyped_storage()))
            )
    backward = PerExampleGradients.backward

    def counted(*args, **kwargs):
        gc.collect()
        alive.append(len({id(s) for ref in storages if (s := ref()) is not None}))
        return backward(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(PerExampleGradients, "backward", counted)
        scores(model)
    return max(alive)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"estimator": "true", "label_samples": 2}], ids=str)
def test_scores_stay_the_same(reentrant, options):
    """Guards modules that are called again in the backward pass against being counted twice."""
    expected = scores(causal(), **options)
    actual = scores(causal(checkpointed=True, use_reentrant=reentrant), **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_dropout_stays_off():
    """Guards against checkpointing that is bought with training mode."""
    expected = scores(classifier(), per_token=False)
    actual = scores(classifier(checkpointed=True), per_token=False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_inputs_of_layers_are_not_kept(monkeypatch):
    """Guards the memory that checkpointing saves: neither autograd nor the hooks hold what the
    layers compute."""
    assert inputs_alive(causal(), monkeypatch) >= 4 * LAYERS
    assert inputs_alive(causal(checkpointed=True), monkeypatch) <= LAYERS + 1


def test_one_pass_is_enough(caplog):
    """Guards against one example at a time, which would be right, but slow."""
    scores(causal(checkpointed=True))
    assert "one example at a time" not in caplog.text


def test_layers_are_left_as_they_were():
    """Guards the model against a second checkpoint around that of the Trainer."""
    model = causal(checkpointed=True)
    layers = model.get_base_model().model.layers
    layers[0].forward = own = layers[0].forward
    with checkpointing(model):
        assert all(vars(layer)["forward"] is not own for layer in layers)
    assert vars(layers[0])["forward"] is own
    assert not any("forward" in vars(layer) for layer in layers[1:])


def test_prefixes_are_not_computed_again():
    """Guards caches, which a layer that runs again would lengthen again."""
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))
    model.gradient_checkpointing_enable()
    ids = batches()[0]["input_ids"]
    with checkpointing(model.eval()):
        outputs = model(input_ids=ids, use_cache=True)
        outputs.logits.sum().backward()
    assert outputs.past_key_values.get_seq_length() == ids.shape[1]
