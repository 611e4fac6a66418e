"""What is timed is what its name says."""

import copy

import pytest
import torch

from benchmarks.base_weights import masked
from benchmarks.contenders import HEAD, Contender, half_of, hooked, lora, peers, trainable
from benchmarks.scoring import naive_scores
from benchmarks.shapes import TINY, TINY_CAUSAL, batch_of, packed, padded, sentences, texts
from benchmarks.training import DEFAULT, HOOKS, PUBLISHED, UPPER, half_mask, ways
from benchmarks.training_memory import bytes_held
from fish_tuning import apply_mask, calculate_fisher_information, create_mask_from_fisher, get_mask

RANK = 4


def test_equal_numbers_of_trained_values():
    """Guards against a comparison in which one side trains more."""
    counts, built = {}, ways(TINY, RANK) | peers(TINY, RANK // 2)
    for name, way in built.items():
        contender = Contender.of(way("cpu"))
        counts[name] = contender.num_trainable
        contender.step(batch_of(2, 4, "cpu"))
    budget = counts.pop("LoRA r=2")
    assert counts.pop("LoRA r=4") == counts.pop(HOOKS) > budget
    assert {counts[name] for name in (DEFAULT, PUBLISHED, UPPER)} == {budget}
    # AdaLoRA has one more value per rank; DoRA's magnitudes do not add up to the same count.
    assert counts.pop("AdaLoRA r=2") == budget + 2 * 6
    assert budget / 2 < counts.pop("DoRA r=1") < budget
    assert counts.pop("LoRA-FA r=4") == budget
    assert all(budget - 6 <= count <= budget for count in counts.values()), counts


def test_selections_are_those_of_their_names():
    """Guards against the published selection with entries of A, and lower layers that are
    trained."""
    built = ways(TINY, RANK)
    mask = get_mask(built[PUBLISHED]("cpu"))
    assert not any(bits.any() for name, bits in mask.items() if ".lora_A." in name)
    mask = get_mask(built[UPPER]("cpu"))
    assert {
        name.split(".layer.")[1][0]
        for name, bits in mask.items()
        if bits.all() and HEAD not in name
    } == {"1"}


def test_hooks_mask_gradients():
    """Guards against a baseline that trains something else."""
    model = lora(TINY, RANK, "cpu").eval()
    mask = half_mask(model)
    twin = hooked(TINY, RANK, "cpu", mask).eval()
    twin.load_state_dict(model.state_dict())
    assert sum(int(bits.sum()) for bits in mask.values()) == half_of(model)
    batch = batch_of(2, 4, "cpu")
    for each in (model, twin):
        each(**batch).loss.backward()
    for name, parameter in trainable(twin).items():
        expected = trainable(model)[name].grad * mask[name]
        torch.testing.assert_close(parameter.grad, expected)


def test_the_naive_loop_scores_the_same():
    """Guards against a loop that is compared with something else than it computes."""
    model = lora(TINY, RANK, "cpu", init_lora_weights=False).eval()
    batches = sentences(6, 3, "cpu")
    expected = calculate_fisher_information(model, batches, progress=False)
    for name, scores in naive_scores(model, batches).items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-3, atol=1e-9)


def test_packed_texts_give_the_loss_of_padded_ones():
    """Guards a packed batch whose texts see each other, or that leaves out tokens."""
    model = TINY_CAUSAL.build("cpu").eval()
    with_padding = padded(texts(3, 3, 8, "cpu")[0])
    assert with_padding["attention_mask"].sum(1).tolist() == [2, 5, 8]
    expected = model(**with_padding).loss
    torch.testing.assert_close(model(**packed(with_padding)).loss, expected)


def test_sentences_are_padded_to_the_longest():
    """Guards batches whose padding no real batch has."""
    for batch in sentences(10, 4, "cpu"):
        lengths = batch["attention_mask"].sum(1)
        assert int(lengths.max()) == batch["input_ids"].shape[1]
        assert not batch["input_ids"][batch["attention_mask"] == 0].any()
    assert [len(batch["labels"]) for batch in sentences(10, 4, "cpu")] == [4, 4, 2]


def test_base_weights():
    """Guards against a mask that is not half a percent of the linear weights and the head."""
    model = masked(TINY, "cpu")
    mask = get_mask(model)
    linear = {name for name in mask if "classifier" not in name}
    entries = sum(mask[name].numel() for name in linear)
    assert sum(int(mask[name].sum()) for name in linear) == round(0.005 * entries)
    assert all(name.endswith(".weight") for name in linear)


@pytest.mark.parametrize("shared", [False, True])
def test_bytes_held_counts_memory_once(shared):
    """Guards views of one storage that are counted each."""
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Identity())
    twin = copy.deepcopy(model)
    if shared:
        twin[1].register_buffer("part", twin[0].weight.detach()[:5])
    assert bytes_held(twin) == bytes_held(model) == 400


def test_bytes_held_see_what_a_mask_keeps():
    """Guards measurements against leaving out the place and the number of selected entries."""
    model = torch.nn.Linear(100, 10, bias=False)
    apply_mask(model, create_mask_from_fisher({"weight": torch.rand(10, 100)}, num_trainable=300))
    assert bytes_held(model) == 4 * 1000 + 12 * 300 + 1
