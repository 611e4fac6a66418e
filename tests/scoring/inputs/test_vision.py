"""Qwen2-VL: positions in time, height and width, and patches of several images."""

import pytest
import torch
import transformers as tr

from fish_tuning import calculate_fisher_information
from tests.models import assert_scores_close, with_lora

IMAGE, VISION_START, VISION_END = 30, 32, 33

ROUNDING = 2e-5
"""transformers rounds logits to float32 in its own loss."""


def scored(model, loader):
    return calculate_fisher_information(model, loader, progress=False)


@pytest.fixture(scope="module")
def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = tr.Qwen2VLConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": rope,
            "initializer_range": 0.2,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "hidden_size": 32,
            "patch_size": 2,
            "temporal_patch_size": 1,
            "mlp_ratio": 2,
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    torch.manual_seed(0)
    model = tr.Qwen2VLForConditionalGeneration(config)
    return with_lora(model, target_modules=["q_proj", "v_proj"], init_lora_weights=False).double()


def images_and_texts():
    """Two examples, with 4 and 8 image tokens."""
    generator = torch.Generator().manual_seed(1)
    for height, text in ((4, 6), (8, 3)):
        tokens = torch.randint(3, 30, (text,), generator=generator).tolist()
        ids = torch.tensor([[VISION_START, *[IMAGE] * height, VISION_END, *tokens]])
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).int(),
            "labels": ids.masked_fill(ids >= IMAGE, -100),
            "pixel_values": torch.randn(height * 4, 12, generator=generator).double(),
            "image_grid_thw": torch.tensor([[1, height, 4]]),
        }


@pytest.mark.parametrize("side", ["left", "right"])
def test_m_rope_has_positions_of_its_own(qwen2_vl, side):
    """Guards against replacing positions in time, height and width by those of the text."""
    expected = scored(qwen2_vl, [*images_and_texts()])
    padded = []
    for example in images_and_texts():
        width = (3, 0) if side == "left" else (0, 3)
        fills = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "labels": -100}
        for key, fill in fills.items():
            example[key] = torch.nn.functional.pad(example[key], width, value=fill)
        padded.append(example)
    assert_scores_close(scored(qwen2_vl, padded), expected, rtol=ROUNDING)


def test_patches_of_several_images_are_refused(qwen2_vl):
    """Guards against patches that are given to the wrong example."""
    first, second = images_and_texts()
    batch = {key: torch.cat([first[key], second[key]]) for key in ("pixel_values",)}
    batch["image_grid_thw"] = torch.cat([first["image_grid_thw"], second["image_grid_thw"]])
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
        rows = [first[key][0], second[key][0]]
        batch[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with pytest.raises(
        ValueError, match=r"pixel_values has 48 rows for 2 examples.*\(batch_size=1"
    ):
        scored(qwen2_vl, [batch])
