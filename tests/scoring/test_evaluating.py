"""A model in evaluation mode, given back as it was."""

import torch

from fish_tuning import calculate_fisher_information
from tests.models import batches_of, examples_for, tiny_llama, with_lora


def test_frequencies_that_depend_on_the_text_are_given_back():
    """Guards models with LongRoPE, whose forward pass writes into a buffer."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 6,
        "short_factor": [1.0] * 3,
        "long_factor": [2.0, 4.0, 8.0],
    }
    model = with_lora(tiny_llama(rope_parameters=rope), init_lora_weights=False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    examples = examples_for(model, 3, shortest=8, longest=9)
    calculate_fisher_information(model, batches_of(examples, 3), progress=False)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
