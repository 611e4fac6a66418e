"""The values of a mask, written as parameters by somebody who knows nothing of masks."""

import pytest
import torch

from tests.sparse.readings import READERS, assert_reads_the_same
from tests.sparse.twins import Twins, inputs, loss_of, output_of, tensor_of, values_of

IDS = inputs()


def train(twins, steps=2):
    for i in range(steps):
        twins.backward(i)
        twins.step(lambda parameters: torch.optim.SGD(parameters, 0.1))


def copy_values(values, new):
    with torch.no_grad():
        values.copy_(new)


def swap_values(values, new):
    values.data = new


VALUE_WRITERS = {
    "copy_": copy_values,
    "data.copy_": lambda values, new: values.data.copy_(new),
    "data assigned": swap_values,
}


def write_average(twins, write):
    """Writes half of every trained number, as an average of weights would."""
    for name in twins.partly():
        values, dense = values_of(twins.masked, name), tensor_of(twins.dense, name)
        write(values, values.detach() * 0.5)
        dense.data[twins.bits[name]] *= 0.5


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", VALUE_WRITERS)
def test_an_average_of_the_values_is_read(writer, reader, tmp_path):
    """Guards against averages that merging, saving or copying does not see."""
    twins = Twins.build("lora")
    train(twins)
    write_average(twins, VALUE_WRITERS[writer])
    assert_reads_the_same(twins, reader, tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_an_update_by_hand_is_read(reader, tmp_path):
    """Guards against a loop without an optimizer, whose steps nobody announces."""
    twins = Twins.build("lora")
    for i in range(3):
        twins.backward(i)
        twins.mask_gradients()
        with torch.no_grad():
            for model in twins.models():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
                        p.grad = None
    assert_reads_the_same(twins, reader, tmp_path)


class Averaging(torch.optim.SGD):
    """SGD whose eval mode swaps an average in, as schedule-free optimizers do."""

    def swap(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", p.detach() * 0.5)
                self.state[p]["average"] = p.data
                p.data = average


@pytest.mark.parametrize("reader", READERS)
def test_an_optimizer_with_a_mode_for_evaluation(reader, tmp_path):
    """Guards against evaluating, or going on from, the other of the two modes' values."""
    twins = Twins.build("lora")
    for model in twins.models():
        loss_of(model.eval(), IDS).backward()
    twins.mask_gradients()
    optimizers = [
        Averaging([p for p in model.parameters() if p.requires_grad], 0.1)
        for model in twins.models()
    ]
    frozen = {name: tensor_of(twins.dense, name).detach().clone() for name in twins.bits}
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

    def swap():
        for optimizer in optimizers:
            optimizer.swap()
        for name, bits in twins.bits.items():
            dense = tensor_of(twins.dense, name)
            dense.data = torch.where(bits, dense.detach(), frozen[name])

    swap()
    swap()
    twins.assert_same_output(IDS)
    swap()
    assert_reads_the_same(twins, reader, tmp_path)


def test_a_value_that_is_no_number_is_kept():
    """Guards against a diverged value that is taken for one that nobody wrote."""
    twins = Twins.build("lora")
    for name in twins.partly():
        values_of(twins.masked, name).data[0] = torch.nan
        tensor_of(twins.dense, name).data.view(-1)[twins.bits[name].view(-1).nonzero()[0]] = (
            torch.nan
        )
    for _ in range(2):
        ours, dense = twins.masked.state_dict(), twins.dense.state_dict()
        for name in twins.bits:
            assert torch.equal(ours[name].isnan(), dense[name].isnan())
        with torch.no_grad():
            assert output_of(twins.masked, IDS).isnan().all()


@pytest.mark.parametrize(
    "read",
    [
        lambda model, folder: output_of(model, IDS),
        lambda model, folder: model.state_dict(),
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: model.merge_and_unload(),
    ],
    ids=["forward", "state dict", "save", "merge"],
)
def test_a_tensor_and_its_values_both_written(read, tmp_path):
    """Guards against a guess at which of two different numbers was meant."""
    twins = Twins.build("lora")
    name = twins.partly()[0]
    output_of(twins.masked, IDS)
    with torch.no_grad():
        tensor_of(twins.masked, name).fill_(1)
        values_of(twins.masked, name).fill_(2)
    with pytest.raises(RuntimeError, match=rf"{name} and its trained values.* both written"):
        read(twins.masked, tmp_path)


def test_both_written_with_the_same_numbers():
    """Guards against an error where nothing contradicts."""
    twins = Twins.build("lora")
    with torch.no_grad():
        for name in twins.partly():
            tensor_of(twins.masked, name).fill_(1)
            tensor_of(twins.dense, name).fill_(1)
            values_of(twins.masked, name).fill_(1)
    twins.assert_same_state()
    twins.assert_same_output(IDS)


def test_different_entries_written_on_both_sides():
    """Guards against a write that takes back another of the same tensor."""
    twins = Twins.build("lora")
    name = twins.partly()[0]
    bits = twins.bits[name]
    selected = bits.nonzero()
    first, last = tuple(selected[0]), selected[-1]
    with torch.no_grad():
        for model in twins.models():
            tensor_of(model, name)[first] = 5
        values_of(twins.masked, name)[-1] = 7
        tensor_of(twins.dense, name)[tuple(last)] = 7
    twins.assert_same_output(IDS)
    twins.assert_same_state()


def test_frozen_entries_that_were_written_stay_written():
    """Guards against values in frozen entries that training or saving puts back."""
    twins = Twins.build("lora")
    for model in twins.models():
        for name in twins.bits:
            with torch.no_grad():
                tensor_of(model, name).add_(1)
    train(twins)
    twins.assert_same_state()
