"""Tiny models built from configs, and ragged examples for them: nothing is downloaded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tr
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.rounding import zero_in_theory

OLD_TRANSFORMERS = int(tr.__version__.partition(".")[0]) < 5
"""Whether this is the environment of the adapters library (`make test-adapters`)."""

PAD = 0
VOCABULARY = 40
IGNORED = -100

# Initial weights well above the usual 0.02, so that attention and gradients differ by token.
_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "initializer_range": 0.2}


def _build(model_class: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)


def tiny_bert(
    num_labels: int = 3, task: str = "SequenceClassification", seed: int = 0, **config: Any
) -> Any:
    """BERT with a head; `task` is the end of the class name: `BertFor{task}`."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "max_position_embeddings": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    settings = tr.BertConfig(**{**_SIZES, **sizes, **layers, "num_labels": num_labels, **config})
    return _build(getattr(tr, f"BertFor{task}"), settings, seed)


def tiny_roberta(
    num_labels: int = 3, task: str = "SequenceClassification", seed: int = 0, **config: Any
) -> Any:
    """RoBERTa with a head; its positions count from the padding index."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "max_position_embeddings": 26}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    settings = tr.RobertaConfig(**{**_SIZES, **sizes, **layers, "num_labels": num_labels, **config})
    return _build(getattr(tr, f"RobertaFor{task}"), settings, seed)


def tiny_llama(task: str = "CausalLM", seed: int = 0, **config: Any) -> Any:
    """Llama with grouped queries and an untied head."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "max_position_embeddings": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = tr.LlamaConfig(**{**_SIZES, **sizes, **layers, **config})
    return _build(getattr(tr, f"LlamaFor{task}"), settings, seed)


def tiny_gpt2(model_class: str = "GPT2LMHeadModel", seed: int = 0, **config: Any) -> Any:
    """GPT-2: Conv1D layers, learned positions, head tied to the embedding."""
    sizes = {"n_embd": 12, "n_inner": 20, "n_positions": 24, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    settings = tr.GPT2Config(**{**_SIZES, **sizes, **ends, **config})
    return _build(getattr(tr, model_class), settings, seed)


def tiny_t5(seed: int = 0, **config: Any) -> Any:
    """T5: encoder and decoder share one embedding with the head."""
    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2}
    special = {"decoder_start_token_id": PAD, "relative_attention_num_buckets": 8}
    shared = {key: value for key, value in _SIZES.items() if key != "initializer_range"}
    settings = tr.T5Config(**{**shared, **sizes, **special, **config})
    return _build(tr.T5ForConditionalGeneration, settings, seed)


def tiny_bart(seed: int = 0, **config: Any) -> Any:
    """BART: learned positions, LayerNorm after each block, one shared embedding."""
    sides = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 20))
    }
    sizes = {"d_model": 12, "max_position_embeddings": 24, "init_std": 0.2, **sides}
    special = {"bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    special |= {"forced_eos_token_id": None}
    shared = {key: value for key, value in _SIZES.items() if key != "initializer_range"}
    settings = tr.BartConfig(**{**shared, **sizes, **special, **config})
    return _build(tr.BartForConditionalGeneration, settings, seed)


def tiny_vit(num_labels: int = 3, seed: int = 0, **config: Any) -> Any:
    """ViT over images of 3 x 8 x 8 in four patches, with a head."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "image_size": 8, "patch_size": 4}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    settings = tr.ViTConfig(**{**sizes, **layers, "num_labels": num_labels, **config})
    return _build(tr.ViTForImageClassification, settings, seed)


def with_lora(model: Any, r: int = 4, seed: int = 0, **config: Any) -> PeftModel:
    """LoRA on all linear layers; `init_lora_weights=False` gives a B that is not 0."""
    settings = {"target_modules": "all-linear", "lora_alpha": 2 * r, "lora_dropout": 0.1, **config}
    settings.setdefault("task_type", _peft_task(model))
    if settings["task_type"] == "IMAGE_CLS":
        # PEFT has no task of that name.
        settings |= {"task_type": None, "modules_to_save": ["classifier"]}
        settings.setdefault("exclude_modules", ["classifier"])
    if settings["task_type"] == "TOKEN_CLS":
        # Its head is trained densely; "all-linear" leaves out that of other tasks only.
        settings.setdefault("exclude_modules", ["classifier"])
    if type(model).__name__.startswith("GPT2"):
        settings.setdefault("fan_in_fan_out", True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=r, **settings))


def _peft_task(model: nn.Module) -> str | None:
    name = type(model).__name__
    for end, task in (
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForImageClassification", "IMAGE_CLS"),
        ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("ForMaskedLM", None),
    ):
        if name.endswith(end):
            return task
    return "CAUSAL_LM"


def base_of(model: Any) -> Any:
    """The transformers model below PEFT's wrappers."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.base_model.model if isinstance(model, PeftMixedModel) else model


def examples_for(
    model: Any, n: int, seed: int = 0, *, shortest: int = 3, longest: int = 11
) -> list[dict[str, Tensor]]:
    """Examples with labels as the model's task wants them: images, or unpadded sequences."""
    generator = torch.Generator().manual_seed(seed)
    base = base_of(model)
    task = _peft_task(base)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def some_unlabelled(labels: Tensor) -> Tensor:
        ignored = torch.rand(len(labels), generator=generator) < 0.4
        ignored[-1] = False
        return labels.masked_fill(ignored, IGNORED)

    examples = []
    for _ in range(n):
        if task == "IMAGE_CLS":
            size = base.config.image_size
            image = torch.randn(base.config.num_channels, size, size, generator=generator)
            label = integers(0, base.config.num_labels, 1)[0]
            examples.append({"pixel_values": image, "labels": label})
            continue
        length = int(integers(shortest, longest + 1))
        ids = integers(2, VOCABULARY, length)
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        classes = base.config.num_labels
        kind = getattr(base.config, "problem_type", None)
        if task == "SEQ_CLS" and (kind == "regression" or (kind is None and classes == 1)):
            shape = (classes,) if classes > 1 else ()
            example["labels"] = torch.randn(shape, generator=generator)
        elif task == "SEQ_CLS" and kind == "multi_label_classification":
            example["labels"] = integers(0, 2, classes).float()
        elif task == "SEQ_CLS":
            example["labels"] = integers(0, classes, 1)[0]
        elif task == "TOKEN_CLS":
            example["labels"] = some_unlabelled(integers(0, classes, length))
        elif task == "SEQ_2_SEQ_LM":
            example["labels"] = integers(2, VOCABULARY, int(integers(2, 7)))
        else:
            example["labels"] = some_unlabelled(ids)
        examples.append(example)
    return examples


def pad(
    examples: Sequence[dict[str, Tensor]], pad_id: int = PAD, side: str = "right"
) -> dict[str, Tensor]:
    """One batch; input ids are padded with `pad_id`, labels with -100, masks with 0."""
    fills = {"input_ids": pad_id, "labels": IGNORED}

    def joined(key: str) -> Tensor:
        values = [example[key] for example in examples]
        if values[0].dim() == 0 or values[0].is_floating_point():
            return torch.stack(values)
        return nn.utils.rnn.pad_sequence(
            values, batch_first=True, padding_value=fills.get(key, 0), padding_side=side
        )

    return {key: joined(key) for key in examples[0]}


def batches_of(
    examples: Sequence[dict[str, Tensor]], size: int, pad_id: int = PAD, side: str = "right"
) -> list[dict[str, Tensor]]:
    """The examples in padded batches of `size`."""
    return [pad(examples[i : i + size], pad_id, side) for i in range(0, len(examples), size)]


def reference_loss(model: Any, example: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    """The loss of one example without padding, in the logits' precision, by torch's functions.

    transformers rounds a language model's logits to float32 in its own loss.
    """
    base = base_of(model)
    batch = pad([example])
    logits, labels = model(**batch).logits, batch["labels"]
    task = _peft_task(base)
    if task == "CAUSAL_LM":
        # Virtual tokens (prompt tuning) have no label.
        labels = nn.functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=IGNORED)
        logits, labels = logits[:, :-1], labels[:, 1:]
    if task not in ("SEQ_CLS", "IMAGE_CLS"):
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction=reduction
        )
    if not labels.is_floating_point():
        return nn.functional.cross_entropy(logits, labels)
    if base.config.problem_type == "multi_label_classification":
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return nn.functional.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))


def naive_scores(
    model: Any,
    examples: Sequence[dict[str, Tensor]],
    power: int = 2,
    loss: Callable[[Any, dict[str, Tensor]], Tensor] = reference_loss,
) -> dict[str, Tensor]:
    """The mean |gradient|^power over examples: one forward and one `.backward()` for each."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for example in examples:
        model.zero_grad(set_to_none=True)
        loss(model, example).backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.abs() ** power
    model.zero_grad(set_to_none=True)
    for module, mode in modes.items():
        module.training = mode
    return {name: total / len(examples) for name, total in sums.items()}


def assert_scores_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9
) -> None:
    """Entry by entry, relative to the entry or to the root mean square of its tensor.

    A score that is 0 in theory is compared with the largest score of the model instead.
    """
    assert list(actual) == list(expected)
    largest = max(float(score.max()) for score in expected.values())
    for name, score in expected.items():
        assert actual[name].shape == score.shape, name
        atol = rtol * (largest if zero_in_theory(name) else float(score.square().mean().sqrt()))
        difference = (actual[name] - score).abs() - rtol * score.abs() - atol
        assert float(difference.max()) <= 0, f"{name}: {actual[name]} is not {score}"
