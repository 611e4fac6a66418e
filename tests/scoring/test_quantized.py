"""4-bit layers that bitsandbytes repacks on processors with AVX512-BF16."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fish_tuning import calculate_fisher_information
from tests.models import (
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    tiny_llama,
    with_lora,
)

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="the processor has no AVX512-BF16"
)


@pytest.fixture
def model(tmp_path):
    """Wide enough to be repacked, with a LoRA whose B is not 0."""
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    return with_lora(quantized, init_lora_weights=False, lora_dropout=0.0).eval()


def packed(model):
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers
    return [
        layer
        for layer in layers
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    ]


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_scores_and_training_after_an_evaluation(model):
    """Guards scores and training without the gradients that a repacked layer lets nothing of
    through: they were too small by up to a factor of 300, without an error."""
    examples = examples_for(model, 4, shortest=4, longest=9)
    batches = batches_of(examples, 2)
    with torch.no_grad():
        model(**batches[0])
    assert packed(model)
    scores = calculate_fisher_information(model, batches, progress=False)
    assert not packed(model)
    # After an evaluation, too, nothing is repacked: the loop has all gradients.
    with torch.no_grad():
        model(**batches[0])
    assert not packed(model)
    assert_scores_close(scores, naive_scores(model, examples), rtol=1e-4)


def test_scoring_repacks_nothing(model):
    """Guards scales, which bitsandbytes rounds when it repacks."""
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    before = [(layer.weight.clone(), layer.weight.quant_state.absmax.clone()) for layer in layers]
    calculate_fisher_information(
        model, batches_of(examples_for(model, 4, shortest=4, longest=9), 2), progress=False
    )
    for layer, (bits, scales) in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, bits)
        assert torch.equal(layer.weight.quant_state.absmax, scales)
