"""Every PEFT method under a mask: scored, masked, trained, saved, loaded and merged.

`outcomes` does all of it and asserts each step against plain PyTorch and plain PEFT; what it
returns is a row of docs/methods.md. The page is written by

    python -m tests.methods_table > docs/methods.md
"""

import copy
import dataclasses
import functools
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
import transformers as tr
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_config
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fish_tuning import apply_mask, calculate_fisher_information, create_mask_from_fisher
from fish_tuning.scoring.quantized import keep_differentiable
from tests.models import (
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    pad,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)
from tests.rounding import MARGIN, float32_rtol, nudged
from tests.training import tensor_of

STEPS = ("scores", "mask", "train", "save", "load", "merge")
YES, ONE_BY_ONE, NONE, REFUSED = "yes", "one example at a time", "PEFT has none", "refused"
ROW_BY_ROW = "one pass, its layers row by row"
ROUNDED = "yes; PEFT rounds frozen weights"

DENSITY = 0.4
LR, DECAY = 0.02, 0.1
EPS = 1e-4  # large enough that the rounding errors of a gradient that is 0 in theory move nothing

Adapt = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Method:
    """A row: a model and what is trained of it."""

    name: str
    kind: str = ""
    """The PeftType; empty where the model's own weights are trained."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the PEFT config, over `target_modules` and `task_type`."""
    base: Callable[[], Any] = tiny_bert
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What its forward takes beside the usual, for one example."""
    before: Adapt | None = None
    """Called with the base model and the config before the adapter is added."""
    after: Adapt | None = None
    """Called with the PEFT model and the config afterwards."""
    add: Callable[[Any, Any], Any] = get_peft_model
    """Makes the adapted model of the base model and the config."""
    read: Callable[[Any, Path], Any] = PeftModel.from_pretrained
    """Makes it of the base model and a folder."""
    weights: str = ""
    """Of the model's own weights, those that are trained: a regular expression."""
    batch_size: int = 3
    """1 where the loss of a batch is no mean of the losses of its examples."""
    ragged: bool = True
    """Whether an example that is padded has the gradient of the example alone."""


def tiny_squeezebert() -> Any:
    """BERT whose linear layers are convolutions of width 1."""
    groups = {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "output")}
    sizes = {"vocab_size": 40, "hidden_size": 12, "embedding_size": 12, "intermediate_size": 20}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24}
    settings: dict[str, Any] = {**groups, **sizes, **layers, "intermediate_groups": 1}
    settings |= {"num_labels": 3, "initializer_range": 0.2}
    config = tr.SqueezeBertConfig(**settings)
    return seeded(tr.SqueezeBertForSequenceClassification, config)


def tiny_mixtral() -> Any:
    """A mixture of experts, whose weights are one parameter for all of them."""
    sizes = {"vocab_size": 40, "hidden_size": 12, "intermediate_size": 20, "num_local_experts": 2}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = tr.MixtralConfig(**sizes, **layers, pad_token_id=0, initializer_range=0.2)
    return seeded(tr.MixtralForCausalLM, config)


class AttentionForSequenceClassification(nn.Module):
    """A model with torch's own attention, whose projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        settings: dict[str, Any] = {"vocab_size": 40, "num_labels": 3}
        self.config = tr.BertConfig(**settings)
        self.embed, self.attention = nn.Embedding(40, 12), nn.MultiheadAttention(12, 2)
        self.classifier = nn.Linear(12, 3)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        x = self.embed(input_ids).transpose(0, 1)
        x = x + self.attention(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)[0]
        logits = self.classifier(x[0])
        loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def tiny_attention() -> Any:
    return seeded(AttentionForSequenceClassification)


def tiny_masked_lm() -> Any:
    return tiny_bert(task="MaskedLM")


def llama_without_cache() -> Any:
    return tiny_llama(use_cache=False)


def bert_in_4_bits() -> Any:
    return quantized(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def bert_in_8_bits() -> Any:
    return quantized(load_in_8bit=True)


def quantized(**bits: Any) -> Any:
    """BERT whose frozen weights bitsandbytes has quantized; its head is left as it is."""
    folder = tempfile.mkdtemp(dir=_TEMPORARY.name)
    tiny_bert().save_pretrained(folder)
    config = tr.BitsAndBytesConfig(llm_int8_skip_modules=["classifier"], **bits)
    model = tr.AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=config, device_map="cpu"
    )
    keep_differentiable(model)
    return model


def seeded(build: Callable[..., Any], *args: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args)


def _calibration(model: Any) -> list[dict[str, Tensor]]:
    return batches_of(examples_for(model, 6, seed=7), 3)


def _backward(base: Any) -> None:
    for batch in _calibration(base):
        base(**batch).loss.backward()


def _start_lora_ga(base: Any, config: Any) -> None:
    preprocess_loraga(base, config, train_step=lambda: _backward(base))


def _start_eva(model: Any, config: Any) -> None:
    initialize_lora_eva_weights(
        model,
        _calibration(model),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, batch, name: inputs[0].flatten(0, 1),
        show_progress_bar=False,
    )


def _start_corda(base: Any, config: Any) -> None:
    # It takes `dataclass` from attrs, which peft does not require.
    with patch.dict(sys.modules, attr=dataclasses):
        from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for example in examples_for(base, 6, seed=7):
            base(**pad([example]))

    preprocess_corda(base, config, run)


def _in_place(base: Any, config: Any) -> Any:
    base.add_adapter(config)
    return base


def _read_in_place(base: Any, folder: Path) -> Any:
    base.load_adapter(folder)
    return base


def _mixed(base: Any, config: Any) -> Any:
    """Two kinds of adapters on the same layers."""
    model: Any = get_peft_model(base, config, mixed=True)
    model.add_adapter("second", LoHaConfig(r=4, target_modules=config.target_modules))
    model.set_adapter(["default", "second"])
    return model


def _as_quantized(base: Any, config: Any) -> None:
    """QA-LoRA is only for GPTQ's layers; here these hold the weights that they would represent."""
    config._register_custom_module({nn.Linear: GPTQLoraLinear})


def _arrow(base: Any, config: Any) -> Any:
    return create_arrow_model(base, _two_adapters(base), config.arrow_config)


def _read_arrow(base: Any, folder: Path) -> Any:
    experts = [str(folder / name) for name in ("task_0", "task_1")]
    return create_arrow_model(base, experts, lora_config.ArrowConfig(top_k=1, rng_seed=0))


def _trained_arrow(base: Any, config: Any) -> Any:
    model = _arrow(base, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".task_" in name)
    return model


def _second_adapter(model: Any, config: Any) -> None:
    model.add_adapter("second", LoraConfig(r=4, target_modules=["key"], init_lora_weights=False))


def _experts(base: Any, config: Any) -> None:
    """The adapters are read when the model is built."""
    config.adapters = {str(i): folder for i, folder in enumerate(_two_adapters(base))}


def _two_adapters(base: Any) -> list[str]:
    """Two LoRA adapters on disk."""
    folders = [tempfile.mkdtemp(dir=_TEMPORARY.name) for _ in range(2)]
    for folder in folders:
        lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(type(base)(base.config), lora).save_pretrained(folder)
    return folders


_TEMPORARY = tempfile.TemporaryDirectory()

_LLAMA = {"base": tiny_llama}
_VIRTUAL = {"target_modules": None, "num_virtual_tokens": 4}
_TASKS = {"task_ids": torch.tensor(1)}

METHODS = (
    Method("LoRA", "LORA", {"r": 4}),
    Method(
        "LoRA, GPT-2",
        "LORA",
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        tiny_gpt2,
    ),
    Method("LoRA, embedding", "LORA", {"r": 4, "target_modules": ["word_embeddings", "query"]}),
    Method("LoRA, convolution", "LORA", {"r": 4}, tiny_squeezebert),
    Method(
        "LoRA, `nn.MultiheadAttention`",
        "LORA",
        {
            "r": 4,
            "target_modules": ["attention"],
            "task_type": None,
            "modules_to_save": ["classifier"],
        },
        tiny_attention,
    ),
    Method(
        "LoRA, `target_parameters`",
        "LORA",
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        tiny_mixtral,
    ),
    Method("LoRA, `bias`", "LORA", {"r": 4, "bias": "all"}),
    Method("LoRA, `lora_bias`", "LORA", {"r": 4, "lora_bias": True}),
    Method(
        "LoRA, `modules_to_save`", "LORA", {"r": 4, "modules_to_save": ["classifier", "pooler"]}
    ),
    Method(
        "LoRA, `trainable_token_indices`",
        "LORA",
        {"r": 4, "trainable_token_indices": {"word_embeddings": [3, 5, 9]}},
    ),
    Method(
        "LoRA, `layer_replication`",
        "LORA",
        {"r": 4, "target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]},
        tiny_llama,
    ),
    Method("LoRA, two adapters", "LORA", {"r": 4}, after=_second_adapter),
    Method("LoRA, `model.add_adapter`", "LORA", {"r": 4}, add=_in_place, read=_read_in_place),
    Method("LoRA and LoHa, `mixed=True`", "LORA", {"r": 4}, add=_mixed),
    Method("LoRA, 4-bit base", "LORA", {"r": 4}, bert_in_4_bits),
    Method("LoRA, 8-bit base", "LORA", {"r": 4}, bert_in_8_bits),
    Method("rsLoRA", "LORA", {"r": 4, "use_rslora": True}),
    Method("DoRA", "LORA", {"r": 4, "use_dora": True}),
    Method(
        "DoRA, embedding",
        "LORA",
        {"r": 4, "use_dora": True, "target_modules": ["word_embeddings", "query"]},
    ),
    Method("DoRA, convolution", "LORA", {"r": 4, "use_dora": True}, tiny_squeezebert),
    Method("PiSSA start", "LORA", {"r": 4, "init_lora_weights": "pissa"}),
    Method("OLoRA start", "LORA", {"r": 4, "init_lora_weights": "olora"}),
    Method(
        "EVA start",
        "LORA",
        {"r": 2, "init_lora_weights": "eva", "eva_config": lora_config.EvaConfig()},
        after=_start_eva,
    ),
    Method(
        "LoRA-GA start",
        "LORA",
        {"r": 4, "init_lora_weights": "lora_ga", "lora_ga_config": lora_config.LoraGAConfig()},
        before=_start_lora_ga,
    ),
    Method(
        "CorDA start",
        "LORA",
        {
            "r": 4,
            "init_lora_weights": "corda",
            "corda_config": lora_config.CordaConfig(corda_method="ipm"),
        },
        before=_start_corda,
    ),
    Method("MiCA", "LORA", {"r": 4, "init_lora_weights": "mica"}),
    Method("Orthogonal start", "LORA", {"r": 4, "init_lora_weights": "orthogonal"}),
    Method(
        "aLoRA",
        "LORA",
        {"r": 4, "target_modules": ["q_proj"], "alora_invocation_tokens": [7]},
        tiny_llama,
    ),
    Method(
        "Arrow",
        "LORA",
        {"arrow_config": lora_config.ArrowConfig(top_k=1, rng_seed=0)},
        tiny_llama,
        add=_arrow,
    ),
    Method(
        "Arrow, its experts trained",
        "LORA",
        {"arrow_config": lora_config.ArrowConfig(top_k=1, rng_seed=0)},
        tiny_llama,
        add=_trained_arrow,
        read=_read_arrow,
    ),
    Method(
        "BD-LoRA",
        "LORA",
        {
            "r": 4,
            "use_bdlora": lora_config.BdLoraConfig(
                target_modules_bd_a=["query", "value"], nblocks=2
            ),
        },
    ),
    Method("KaSA", "LORA", {"r": 4, "kasa_config": lora_config.KasaConfig()}),
    Method("MonteCLoRA", "LORA", {"r": 4, "monteclora_config": lora_config.MontecloraConfig()}),
    Method(
        "QA-LoRA",
        "LORA",
        {"r": 4, "use_qalora": True, "qalora_group_size": 4},
        before=_as_quantized,
    ),
    Method("VeLoRA", "LORA", {"r": 4, "velora_config": lora_config.VeloraConfig(num_groups=4)}),
    Method("AdaLoRA", "ADALORA", {"init_r": 4, "target_r": 2, "total_step": 9}),
    Method("AdaMSS", "ADAMSS", {"r": 4, "num_subspaces": 2, "subspace_rank": 1}),
    Method(
        "AdaMSS, `use_asa`",
        "ADAMSS",
        {
            "r": 4,
            "num_subspaces": 2,
            "subspace_rank": 1,
            "use_asa": True,
            "asa_target_subspaces": 2,
            "init_warmup": 1,
            "final_warmup": 9,
        },
    ),
    Method(
        "Adaption prompt",
        "ADAPTION_PROMPT",
        {"target_modules": None, "adapter_len": 4, "adapter_layers": 2},
        **_LLAMA,
    ),
    Method("BEFT", "BEFT"),
    Method("BOFT", "BOFT", {"boft_block_size": 4}),
    Method("C3A", "C3A", {"block_size": 4}),
    Method("Cartridge", "CARTRIDGE", _VIRTUAL, **_LLAMA),
    Method(
        "CPT",
        "CPT",
        {
            "target_modules": None,
            "cpt_token_ids": [3, 4, 5, 6],
            "cpt_mask": [1] * 4,
            "cpt_tokens_type_mask": [1, 2, 3, 4],
        },
        batch_size=1,
        **_LLAMA,
    ),
    Method("DEFT", "DEFT", {"r": 4}),
    Method("DeLoRA", "DELORA", {"r": 4}),
    Method("FourierFT", "FOURIERFT", {"n_frequency": 20}),
    Method("FRoD", "FROD", {"progressbar": False, "sparse_rate": 0.1}),
    Method("GLoRA", "GLORA", {"r": 4}),
    Method("GraLoRA", "GRALORA", {"r": 4, "gralora_k": 2}),
    Method("HiRA", "HIRA", {"r": 4}),
    Method("HRA", "HRA", {"r": 4}),
    Method("IA3", "IA3", {"feedforward_modules": []}),
    Method(
        "IA3, feed-forward",
        "IA3",
        {"target_modules": ["value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    Method("LayerNorm tuning", "LN_TUNING", {"target_modules": ["LayerNorm"]}),
    Method("Lily", "LILY", {"r": 4, "stride_A": 1, "num_B": 2}, ragged=False),
    Method("LoHa", "LOHA", {"r": 4}),
    Method("LoKr", "LOKR", {"r": 4}),
    Method("MiSS", "MISS", {"r": 4}),
    Method("MiSS, `bat`", "MISS", {"r": 4, "init_weights": "bat"}),
    Method("MiSS, `mini`", "MISS", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    Method(
        "Multitask prompt tuning",
        "MULTITASK_PROMPT_TUNING",
        {**_VIRTUAL, "num_tasks": 2},
        inputs=_TASKS,
        **_LLAMA,
    ),
    Method("OFT", "OFT", {"oft_block_size": 4}),
    Method("OSF", "OSF", {"effective_rank": 4}),
    Method("P-tuning", "P_TUNING", {**_VIRTUAL, "encoder_hidden_size": 6}, **_LLAMA),
    Method("PEANuT", "PEANUT", {"r": 4}),
    Method("Poly", "POLY", {"r": 4, "n_tasks": 2, "n_skills": 2}, inputs=_TASKS),
    Method("Prefix tuning", "PREFIX_TUNING", _VIRTUAL, **_LLAMA),
    Method("Prompt tuning", "PROMPT_TUNING", _VIRTUAL, **_LLAMA),
    Method("PSOFT", "PSOFT", {"r": 4}),
    Method("PVeRA", "PVERA", {"r": 4}),
    Method("RandLoRA", "RANDLORA", {"r": 4}),
    Method("RoAd", "ROAD", {"group_size": 4}),
    Method("RoAd, `road_4`", "ROAD", {"group_size": 4, "variant": "road_4"}),
    Method("Shadow", "SHADOW", {"target_modules": None, "r": 4}, **_LLAMA),
    Method("SHiRA", "SHIRA", {"r": 2}),
    Method("Super-Tuning", "SUPERTUNING"),
    Method("Super-Tuning, `r`", "SUPERTUNING", {"r": 4}),
    Method("TinyLoRA", "TINYLORA", {"r": 2, "u": 8}),
    Method(
        "Trainable tokens",
        "TRAINABLE_TOKENS",
        {"target_modules": ["word_embeddings"], "token_indices": [3, 5, 9]},
    ),
    Method("Uni-LoRA", "UNILORA", {"r": 4, "theta_d_length": 32}),
    Method("VB-LoRA", "VBLORA", {"r": 4, "num_vectors": 8, "vector_length": 4}),
    Method("VeRA", "VERA", {"r": 4}),
    Method("WaveFT", "WAVEFT", {"n_frequency": 20}),
    Method(
        "X-LoRA",
        "XLORA",
        {"target_modules": None, "hidden_size": 12, "xlora_size": 8, "xlora_depth": 2},
        llama_without_cache,
        before=_experts,
    ),
    Method("BitFit: biases and the head", weights=r"bias$|^classifier"),
    Method("All weights, BERT", weights=""),
    Method("All weights, GPT-2 with tied head", base=tiny_gpt2),
    Method("All weights, masked LM with tied head", base=tiny_masked_lm),
)


def build(method: Method) -> Any:
    """The model with its adapter, in evaluation mode; the same at every call.

    Every trainable entry is moved a little from its start, where some have a gradient of 0 (LoRA's
    A) or are 0 themselves.
    """
    return seeded(_build, method)


def _build(method: Method) -> Any:
    base = method.base().eval()
    if not method.kind:
        for name, parameter in base.named_parameters():
            parameter.requires_grad = bool(re.search(method.weights, name))
        return base
    config = _config(method, base)
    if method.before is not None:
        method.before(base, config)
    model = method.add(base, config)
    if method.after is not None:
        method.after(model, config)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def _config(method: Method, base: Any) -> Any:
    causal = type(base).__name__.endswith(("CausalLM", "LMHeadModel"))
    options = {
        "target_modules": ["q_proj", "v_proj"] if causal else ["query", "value"],
        "task_type": "CAUSAL_LM" if causal else "SEQ_CLS",
        **copy.deepcopy(dict(method.options)),
    }
    if options["target_modules"] is None:
        del options["target_modules"]
    return PEFT_TYPE_TO_CONFIG_MAPPING[method.kind](**options)


def _examples(method: Method, model: Any) -> list[dict[str, Tensor]]:
    lengths = {} if method.ragged else {"shortest": 7, "longest": 7}
    return [{**example, **method.inputs} for example in examples_for(model, 6, **lengths)]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def outcomes(method: Method, folder: Path) -> dict[str, str]:
    """The outcome of each step, by step; a wrong step fails an assertion."""
    model = build(method)
    examples = _examples(method, model)
    batches = batches_of(examples, method.batch_size)
    found = dict.fromkeys(STEPS, YES)

    try:
        with logged() as messages:
            scores = calculate_fisher_information(model, batches, progress=False)
    except ValueError as refusal:
        return dict.fromkeys(STEPS, REFUSED) | {"scores": f"{REFUSED}: {refusal}"}
    if any(ONE_BY_ONE in message for message in messages):
        found["scores"] = ONE_BY_ONE
    elif any("recomputed row by row" in message for message in messages):
        found["scores"] = ROW_BY_ROW
    naive = functools.partial(naive_scores, model, examples, loss=own_loss)
    expected = naive()
    assert_scores_close(scores, expected, float32_rtol(model, naive, expected))

    k = round(DENSITY * sum(score.numel() for score in scores.values()))
    mask = create_mask_from_fisher(scores, num_trainable=k, scope="per_tensor")
    assert mask.num_trainable == k
    assert len({model.get_parameter(name).data_ptr() for name in mask}) == len(mask)  # tied: once
    start, parameters = state_of(model), [*model.parameters()]
    try:
        apply_mask(model, mask)
    except ValueError as refusal:
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        return found | dict.fromkeys(STEPS[2:], REFUSED) | {"mask": f"{REFUSED}: {refusal}"}
    assert sum(p.numel() for p in trainable(model).values()) == k

    untrained = build(method)
    rounded = moved_by_forward(untrained, batches[0])
    if rounded:
        found["train"] = ROUNDED
    train(model, batches)
    dense = build(method)
    train(dense, batches, mask)
    other = build(method)
    with nudged(other, seed=0):
        train(other, batches, mask)
        changes = changes_of(dense, other)
    assert_trained(model, dense, mask, start, changes, rounded)
    outputs = output(model, batches[0])
    assert not torch.allclose(outputs, output(untrained, batches[0]), atol=1e-4)

    try:
        names = saved(dense, folder / "dense")
    except NotImplementedError:
        found["save"] = NONE
    else:
        assert saved(model, folder / "masked") == names
    of_dense = output(dense, batches[0])
    for step, ours, of_peft in (
        ("load", lambda: load(method, folder / "masked"), lambda: load(method, folder / "dense")),
        ("merge", lambda: model.merge_and_unload(), lambda: dense.merge_and_unload()),
    ):
        if _gives(of_dense, of_peft, batches[0]):
            torch.testing.assert_close(output(ours(), batches[0]), outputs, rtol=1e-4, atol=1e-5)
        else:
            found[step] = NONE
    return found


def scores_in_double(method: Method) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The scores of the library and those of the loop over single examples."""
    model = build(method).double()
    examples = _examples(method, model)
    scores = calculate_fisher_information(
        model, batches_of(examples, method.batch_size), progress=False
    )
    return scores, naive_scores(model, examples)


def load(method: Method, folder: Path) -> Any:
    base = method.base()
    if not method.kind:
        return type(base).from_pretrained(folder)
    return method.read(base, folder)


def _gives(outputs: Tensor, of_peft: Callable[[], Any], batch: dict[str, Tensor]) -> bool:
    """Whether PEFT can do it without a mask, with the same outputs."""
    try:
        return torch.allclose(output(of_peft(), batch), outputs, rtol=1e-4, atol=1e-5)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return False


def own_loss(model: Any, example: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = model(**pad([dict(example)])).loss
    return loss


def state_of(model: nn.Module) -> dict[str, Tensor]:
    # Under a mask, a parameter is the values alone; the whole tensor is its module's attribute.
    parameters = [(name, tensor_of(model, name)) for name, _ in model.named_parameters()]
    tensors = [*parameters, *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def train(model: Any, batches: list[dict[str, Tensor]], mask: Any = None, steps: int = 3) -> None:
    """AdamW with weight decay; with a mask, on dense tensors: gradients and decay are masked."""
    decay = DECAY if mask is None else 0
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), LR, eps=EPS, weight_decay=decay)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        if mask is not None:
            with torch.no_grad():
                for name, p in parameters.items():
                    if p.grad is None:
                        continue  # As AdamW does: without a gradient nothing decays.
                    p.grad *= mask[name]
                    p *= torch.where(mask[name], 1 - LR * DECAY, 1.0)
        optimizer.step()


def moved_by_forward(model: nn.Module, batch: dict[str, Tensor]) -> set[str]:
    """What PEFT itself changes, by rounding, where nothing is trained and nothing masked."""
    before = state_of(model)
    output(model, batch)
    after = state_of(model)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    for name in moved:
        torch.testing.assert_close(after[name], before[name])
    return moved


def changes_of(model: nn.Module, other: nn.Module) -> dict[str, float]:
    """Return the largest difference of each parameter between two models."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        return {
            name: float((p.float() - theirs[name].float()).abs().max())
            for name, p in model.named_parameters()
            if p.is_floating_point()
        }


def assert_trained(
    model: nn.Module,
    reference: nn.Module,
    mask: Mapping[str, Tensor],
    start: dict[str, Tensor],
    changes: Mapping[str, float],
    rounded: Collection[str] = (),
) -> None:
    """Check that selected entries are the reference's and that all others kept their bits.

    Args:
        model: The masked model after training.
        reference: The dense model, trained with masked gradients.
        mask: What was selected.
        start: Parameters and buffers before training.
        changes: How far rounding moves each tensor of the reference, see `changes_of`.
        rounded: Tensors that PEFT itself rounds.
    """
    now, expected = state_of(model), state_of(reference)
    for name, before in start.items():
        if name in rounded:
            torch.testing.assert_close(now[name], before)
            continue
        frozen = ~mask[name] if name in mask else torch.ones(before.shape, dtype=torch.bool)
        assert torch.equal(now[name][frozen], before[frozen]), f"{name} moved"
        if name in mask:
            torch.testing.assert_close(
                now[name],
                expected[name],
                rtol=1e-6,
                atol=1e-6 + MARGIN * changes[name],
                msg=lambda m, n=name: f"{n}: {m}",
            )
            # AdamW leaves a tensor alone that no gradient reached.
            idle = not mask[name].any() or torch.equal(expected[name], before)
            assert idle or not torch.equal(now[name], before), f"{name} stayed"


def saved(model: Any, folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and types of all tensors in the weight files that the model writes."""
    model.save_pretrained(folder)
    found = {
        f"{file.relative_to(folder)}: {name}": (tensor.shape, tensor.dtype)
        for file in sorted(folder.rglob("*model.safetensors"))
        for name, tensor in load_file(file).items()
    }
    assert found
    return found


@torch.no_grad()
def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model.eval()(**batch).logits
    return logits


@contextmanager
def logged() -> Iterator[list[str]]:
    """The messages of the library's loggers while inside."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("fish_tuning")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def page(rows: Mapping[str, Mapping[str, str]]) -> str:
    """docs/methods.md, from the outcomes by method."""
    lines = ["| method | " + " | ".join(STEPS) + " |", "|---" * (len(STEPS) + 1) + "|"]
    lines += ["| " + " | ".join([name, *found.values()]) + " |" for name, found in rows.items()]
    words = {
        "one_by_one": ONE_BY_ONE,
        "row_by_row": ROW_BY_ROW,
        "rounded": ROUNDED,
        "none": NONE,
    }
    introduction = _INTRODUCTION.format(version=peft.__version__, **words)
    return introduction + "\n".join(lines) + "\n"


_INTRODUCTION = """# PEFT methods

What works with each method of peft {version}, with variants of LoRA, and with a model's own
weights. `python -m tests.methods_table > docs/methods.md` writes this page by trying each method
on a tiny model; the tests repeat this and compare.

- **scores**: `calculate_fisher_information` gives the same scores as a loop over single examples.
  "{one_by_one}" means that it has to run that loop, because some layer does not give a gradient
  for each row of a batch. "{row_by_row}" means that its layers use an operation that
  torch.func.vmap does not support, which takes up to as long as the loop.
- **mask**: `create_mask_from_fisher` and `apply_mask` leave exactly k trainable numbers.
- **train**: three steps of AdamW with weight decay give the same result as dense training with
  masked gradients, and all other tensors and entries of the model keep their bits. "{rounded}"
  means that PEFT adds the adapter to the frozen weights in a forward pass and subtracts it again,
  with or without a mask.
- **save**: `save_pretrained` writes the same tensors as without a mask.
- **load**: `PeftModel.from_pretrained` (`from_pretrained` for a model's own weights) gives the
  same outputs.
- **merge**: `merge_and_unload` gives the same outputs.

"{none}" means that PEFT cannot do it without a mask either, or that the outputs change when it
does. This is the case for quantized base models, which are quantized again when they are merged:
the merged model is the one PEFT makes of the same adapter without a mask.

QA-LoRA is meant for layers quantized by GPTQ; its row uses unquantized layers instead. Arrow's
router has no trainable parameters of its own. Methods that need packages the tests do not install
are missing: LoftQ's starting point, layers quantized by other libraries, and Megatron's layers.

"""


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """The table of a page: cells by step, by method."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {
        name: dict(zip(STEPS, steps, strict=True)) for name, *steps in cells if name != "method"
    }


def write_page(
    methods: Sequence[Any], outcomes: Callable[..., Any], page: Callable[..., str]
) -> None:
    """Tries every method and prints the page of outcomes."""
    rows = {}
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            rows[method.name] = outcomes(method, Path(folder))
    sys.stdout.write(page(rows))


if __name__ == "__main__":
    write_page(METHODS, outcomes, page)
