"""apply_mask: what is trained, what stays, and what everybody else sees of the model."""

import copy
import gc
import io
import tracemalloc
import weakref

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from transformers.optimization import Adafactor

from fish_tuning import FishMask, apply_mask, get_mask, remove_mask
from fish_tuning.masked_tensors import storage
from fish_tuning.masked_tensors.parameters import UNSELECTED
from fish_tuning.sparse.apply import masked_parameters
from fish_tuning.sparse.registry import _live, state_of
from tests.models import examples_for, pad, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, with_lora
from tests.training import tensor_of, tensors_of, trainable

LR, DECAY = 0.02, 0.1
HEAD = "modules_to_save"


def lora_bert(**config):
    """LoRA whose B is not zero, so that every entry of A and B gets a gradient."""
    return with_lora(tiny_bert(), init_lora_weights=False, **config)


def lora_llama(**config):
    return with_lora(tiny_llama(), init_lora_weights=False, **config)


def random_mask(model, density=0.4, dense=HEAD, seed=0):
    """Random bits for every trainable tensor, all True where `dense` is in the name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(p.shape, dtype=torch.bool)
        if dense and dense in name
        else torch.rand(p.shape, generator=generator) < density
        for name, p in trainable(model).items()
    }


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def bits_of(tensor):
    return tensor.contiguous().view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    )


def assert_frozen_kept(model, mask, before):
    for name, bits in mask.items():
        now = bits_of(tensor_of(model, name))
        assert torch.equal(now[~bits], bits_of(before[name])[~bits]), name


def sum_of(output):
    """A loss of all that a model without a head gives."""
    return output.last_hidden_state.square().sum() + output.pooler_output.square().sum()


def batch_for(model, seed=0, n=4):
    return pad(examples_for(model, n, seed))


def step(model, optimizer, batch):
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


def train(model, steps=3, lr=LR, seed=0):
    """A few steps of AdamW, without dropout."""
    model.eval()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr, weight_decay=DECAY)
    for i in range(steps):
        step(model, optimizer, batch_for(model, seed + i))
    return optimizer


def masked_pair(model, mask=None):
    """The masked model and its dense twin, with the mask."""
    mask = random_mask(model) if mask is None else mask
    twin = copy.deepcopy(model)
    return apply_mask(model, mask).eval(), twin.eval(), mask


class Reference:
    """Dense training that masks gradients and decays selected entries alone."""

    def __init__(self, model, mask, optimizer, lr=LR, **settings):
        self.parameters, self.mask, self.lr = trainable(model), mask, lr
        self.coupled = optimizer is torch.optim.SGD
        self.optimizer = optimizer(self.parameters.values(), lr, weight_decay=0, **settings)

    def mask_gradients(self):
        for name, p in self.parameters.items():
            if name in self.mask:
                p.grad *= self.mask[name]

    @torch.no_grad()
    def step(self, decay, undecayed=()):
        for name, p in self.parameters.items():
            if name in undecayed:
                continue
            selected = self.mask.get(name, torch.ones((), dtype=torch.bool))
            if self.coupled:
                p.grad += decay * p * selected
            else:
                p -= self.lr * decay * p * selected
        self.optimizer.step()
        self.optimizer.zero_grad()


def assert_same(model, reference, names, tolerance=None):
    for name in names:
        expected = tensor_of(reference, name)
        tolerance = tolerance or (1e-12 if expected.dtype == torch.float64 else 1e-6)
        torch.testing.assert_close(
            tensor_of(model, name),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: n + m,
        )


class Net(nn.Module):
    """A layer used twice under two names, a parameter of the root, a frozen one, a buffer."""

    def __init__(self, size=6):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(size, size)
        self.again = self.first
        self.root = nn.Parameter(torch.randn(size, size))
        self.norm = nn.LayerNorm(size)
        self.last = nn.Linear(size, 2)
        self.fixed = nn.Parameter(torch.randn(size), requires_grad=False)

    def forward(self, x, fail=False):
        x = torch.tanh(self.first(x)) @ self.root + self.fixed
        if fail:
            raise ArithmeticError("midway")
        return self.last(self.norm(torch.tanh(self.again(x))))


def net_mask(model, seed=0):
    """Some entries of each tensor; none of one, all of another."""
    mask = random_mask(model, seed=seed)
    mask["last.bias"].zero_()
    mask["norm.weight"].fill_(True)
    return mask


def masked_net(seed=0):
    model = Net()
    return apply_mask(model, net_mask(model, seed)), net_mask(Net(), seed)


def inputs(seed=0, dtype=torch.float32):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


# What is trained


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, LR, weight_decay=DECAY),
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=DECAY),
    "adafactor-torch": lambda ps: torch.optim.Adafactor(ps, LR, weight_decay=DECAY),
    "adafactor-transformers": lambda ps: Adafactor(
        ps, lr=LR, weight_decay=DECAY, scale_parameter=False, relative_step=False
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_entries_keep_their_bits(optimizer, dtype):
    """Guards against weight decay and momentum that move frozen entries, and idle selected ones."""
    model = lora_bert().to(dtype).train()
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    apply_mask(model, mask)
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    torch.manual_seed(0)
    had_gradient = torch.zeros_like(flat(masked_parameters(model)), dtype=torch.bool)
    changed = {name: torch.zeros_like(bits) for name, bits in mask.items()}
    for i in range(50):
        step(model, optimizer, batch_for(model, i))
        had_gradient |= flat(values.grad != 0 for values in masked_parameters(model))
        for name, ever in changed.items():
            ever |= tensor_of(model, name) != before[name]
    assert_frozen_kept(model, mask, before)
    count = sum(int(bits.sum()) for bits in mask.values())
    head = sum(p.numel() for n, p in trainable(model).items() if HEAD in n)
    assert had_gradient.sum() + head >= 0.99 * count
    assert sum(int(ever.sum()) for ever in changed.values()) == had_gradient.sum() + head


def test_optimizer_and_counters_see_k_numbers(capsys):
    """Guards against optimizer state for frozen entries and counts that tell the target."""
    model = lora_bert()
    mask = random_mask(model)
    k = sum(int(bits.sum()) for bits in mask.values())
    head = sum(bits.numel() for name, bits in mask.items() if HEAD in name)
    total = sum(p.numel() for p in model.parameters())
    dense = sum(bits.numel() for bits in mask.values())
    apply_mask(model, mask)
    assert sum(p.numel() for p in masked_parameters(model)) == k - head
    assert sum(p.numel() for p in trainable(model).values()) == k
    optimizer = train(model, 1)
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert sum(t.numel() for t in state if t.dim()) == 2 * k
    assert model.get_nb_trainable_parameters() == (k, total - dense + k)
    model.print_trainable_parameters()
    assert f"trainable params: {k:,} ||" in capsys.readouterr().out
    assert get_mask(model) == FishMask(mask)


@pytest.mark.parametrize("group_entries", [2**22, 100, 1], ids=["one-group", "groups", "each"])
@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=lambda o: o.__name__.lower()
)
def test_training_equals_a_dense_reference(monkeypatch, optimizer, group_entries):
    """Guards against gradients that land on other entries, in one group or in many."""
    monkeypatch.setattr(storage, "GROUP_ENTRIES", group_entries)
    model, twin, mask = masked_pair(lora_bert().double())
    assert (len(state_of(model).groups) > 1) == (group_entries < 2**22)
    settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    ours = optimizer(trainable(model).values(), LR, weight_decay=DECAY, **settings)
    reference = Reference(twin, mask, optimizer, **settings)
    for i in range(20):
        step(model, ours, batch_for(model, i))
        twin(**batch_for(model, i)).loss.backward()
        reference.mask_gradients()
        reference.step(DECAY)
    assert_same(model, twin, mask)


def test_accumulation_and_clipping_equal_a_dense_reference():
    """Guards against norms over other entries than the selected, and lost accumulated gradients."""
    model, twin, mask = masked_pair(lora_bert().double())
    ours = torch.optim.AdamW(trainable(model).values(), LR, weight_decay=DECAY)
    reference = Reference(twin, mask, torch.optim.AdamW)
    for i in range(5):
        for part in range(3):
            model(**batch_for(model, 3 * i + part)).loss.backward()
            twin(**batch_for(model, 3 * i + part)).loss.backward()
        reference.mask_gradients()
        norms = [clip_grad_norm_(trainable(m).values(), 0.05) for m in (model, twin)]
        assert norms[0] > 0.05
        torch.testing.assert_close(norms[0], norms[1])
        ours.step(), ours.zero_grad()
        reference.step(DECAY)
    assert_same(model, twin, mask)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    """Guards against gradients that a layer's second run in backward sends elsewhere."""
    gradients = []
    for checkpointed in (False, True):
        model = lora_llama(lora_dropout=0.0)
        apply_mask(model, random_mask(model))
        model.train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for seed in range(2):
            model(**batch_for(model, seed)).loss.backward()
        gradients.append([p.grad for p in trainable(model).values()])
    assert all(g.count_nonzero() for g in gradients[0])
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


def test_two_forwards_before_one_backward():
    """Guards against a second forward that invalidates or redirects the gradients of the first."""
    model, twin, mask = masked_pair(lora_bert())
    losses = [sum(m(**batch_for(model, i)).loss for i in range(2)) for m in (model, twin)]
    for loss in losses:
        loss.backward()
    dense = {n: p.grad for n, p in trainable(twin).items() if HEAD not in n}
    expected = torch.cat([dense[n][mask[n]] for n in mask if n in dense])
    found = flat(values.grad for values in masked_parameters(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("between", ["forward", "disabled", "state_dict", "get_mask", "save"])
def test_what_may_come_between_forward_and_backward(between, tmp_path):
    """Guards against a reference forward (as in DPO) or a save that spoils the pending backward."""
    model, twin, _ = masked_pair(lora_bert())
    batch = batch_for(model)
    loss = model(**batch).loss
    with torch.no_grad():
        if between == "forward":
            model(**batch)
        elif between == "disabled":
            with model.disable_adapter():
                model(**batch)
        elif between == "state_dict":
            model.state_dict()
        elif between == "get_mask":
            get_mask(model)
        else:
            model.save_pretrained(tmp_path)
    loss.backward()
    twin(**batch).loss.backward()
    bits = random_mask(twin)
    expected = torch.cat([p.grad[bits[n]] for n, p in trainable(twin).items() if HEAD not in n])
    found = flat(values.grad for values in masked_parameters(model))
    torch.testing.assert_close(found, expected)


def test_backward_after_a_step_fails_as_without_a_mask():
    """Guards against gradients computed in silence from values that have moved on."""
    model, _ = masked_net()
    loss = model(inputs()).sum()
    loss.backward(retain_graph=True)
    torch.optim.SGD(masked_parameters(model), 0.1).step()
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_no_grad_forward_is_fresh_after_a_step(autocast):
    """Guards against evaluation with the values of the last forward with gradients."""
    model, twin, mask = masked_pair(lora_bert())
    batch = batch_for(model)
    with torch.no_grad():
        old = model(**batch).logits
    ours = torch.optim.SGD(trainable(model).values(), 0.5)
    reference = Reference(twin, mask, torch.optim.SGD, lr=0.5)
    with torch.autocast("cpu", enabled=autocast):
        losses = [m(**batch).loss for m in (model, twin)]
    for loss in losses:
        loss.backward()
    reference.mask_gradients()
    ours.step(), reference.step(0)
    with torch.no_grad():
        expected = twin(**batch).logits
        assert not torch.allclose(expected, old, atol=1e-3)
        torch.testing.assert_close(model(**batch).logits, expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, expected)
    for values in masked_parameters(model):
        values.data.zero_()
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)


def test_a_forward_that_raises_leaves_the_model_usable():
    """Guards against views of a lost graph that stay in the model."""
    model, _ = masked_net()
    twin, _ = masked_net()
    with pytest.raises(ArithmeticError, match="midway"):
        model(inputs(), fail=True)
    assert all(b.is_leaf for b in model.buffers())
    copy.deepcopy(model)
    for net in (model, twin):
        net(inputs()).sum().backward()
    for ours, expected in zip(masked_parameters(model), masked_parameters(twin), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_functions_of_modules_called_within_the_model():
    """Guards against a whole model in one reentrant checkpoint whose gradients get lost."""

    class Outer(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    model, plain = Outer(), Net()
    for net in (model, plain):
        apply_mask(net, net_mask(net))
        net(inputs().requires_grad_()).square().sum().backward()
    for ours, expected in zip(masked_parameters(model), masked_parameters(plain), strict=True):
        assert ours.grad.count_nonzero()
        torch.testing.assert_close(ours.grad, expected.grad)


# What others see: files, names, generation, merging


def saved(model, folder):
    model.save_pretrained(folder)
    file = next(
        f for f in ("adapter_model.safetensors", "model.safetensors") if (folder / f).exists()
    )
    return load_file(folder / file)


def test_saved_adapter_is_the_plain_one(tmp_path):
    """Guards against extra or missing names in the adapter file and stale values in it."""
    model, twin, mask = masked_pair(lora_bert())
    plain_names = {n: t.shape for n, t in saved(twin, tmp_path / "plain").items()}
    train(model)
    ours = saved(model, tmp_path / "fish")
    assert {n: t.shape for n, t in ours.items()} == plain_names
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "fish").eval()
    batch = batch_for(model)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert not torch.allclose(loaded(**batch).logits, twin(**batch).logits, atol=1e-3)
    assert FishMask.from_pretrained(tmp_path / "fish") == FishMask(mask)
    assert {f.name for f in (tmp_path / "fish").iterdir()} == {
        f.name for f in (tmp_path / "plain").iterdir()
    } | {"fish_mask.safetensors", "fish_mask.json"}


def test_save_of_another_rank_writes_no_mask(tmp_path):
    """Guards against every process of a run writing the mask."""
    model, _, _ = masked_pair(lora_bert())
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "fish_mask.json").exists()


def dense_step(model, twin, mask, batch, lr=0.5):
    """One step on both; what the twin is now was computed without the library."""
    step(model, torch.optim.SGD(trainable(model).values(), lr), batch)
    reference = Reference(twin, mask, torch.optim.SGD, lr=lr)
    twin(**batch).loss.backward()
    reference.mask_gradients()
    reference.step(0)


def test_merge_right_after_a_step():
    """Guards against merging the values of before the step."""
    model, twin, mask = masked_pair(lora_bert())
    batch = batch_for(model)
    dense_step(model, twin, mask, batch)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**batch).logits, twin(**batch).logits, rtol=1e-5, atol=1e-5
        )


def test_generate_right_after_a_step():
    """Guards against generation, which goes around the PEFT model's forward, with old values."""
    model, twin, mask = masked_pair(lora_llama())
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
    prompt = torch.tensor([[3, 4, 5]])

    def logits(m):
        return torch.stack(m.generate(input_ids=prompt, **options).logits)

    old = logits(model)
    dense_step(model, twin, mask, batch_for(model))
    torch.testing.assert_close(logits(model), logits(twin))
    assert not torch.allclose(logits(model)[0], old[0], atol=1e-3)


def test_disable_adapter_and_go_on():
    """Guards against a base model that is not the base, and training that stops after it."""
    model, twin, mask = masked_pair(lora_bert())
    batch = batch_for(model)
    base = tiny_bert().eval()
    dense_step(model, twin, mask, batch)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    dense_step(model, twin, mask, batch)
    assert_same(model, twin, mask)


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2, tiny_t5], ids=lambda b: b.__name__)
def test_base_weights_of_a_transformers_model(build, tmp_path):
    """Guards against tied embeddings saved twice, untied, or loaded as something else."""
    model = build()
    mask, before = random_mask(model, dense=None), tensors_of(model, trainable(model))
    names = set(saved(build(), tmp_path / "plain"))
    apply_mask(model, mask)
    train(model, 2)
    assert_frozen_kept(model, mask, before)
    assert set(saved(model, tmp_path / "fish")) == names
    loaded = type(model).from_pretrained(tmp_path / "fish").eval()
    batch = batch_for(model)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert FishMask.from_pretrained(tmp_path / "fish") == FishMask(mask)


@pytest.mark.parametrize("selected", [False, True])
def test_tied_embedding_stays_tied_when_cast(selected, tmp_path):
    """Guards against a cast that parts a tied tensor, of which one half is then trained."""
    model = tiny_gpt2()
    names = set(saved(tiny_gpt2(), tmp_path / "plain"))
    mask = random_mask(model, dense=None)
    if not selected:
        mask["transformer.wte.weight"].zero_()
    apply_mask(model, mask)
    model.to(torch.bfloat16)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert set(saved(model, tmp_path / "fish")) == names
    remove_mask(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# Wrong input


def wrong_masks():
    """Name to (change of a good mask, the error)."""
    first = "first.weight"

    def other(mask):
        return {f"model.{name}": bits for name, bits in mask.items()}

    def shape(mask):
        return mask | {first: mask[first][:2]}

    def unknown(mask):
        return mask | {"first.wieght": mask[first]}

    def values(mask):
        return mask | {first: mask[first] * 0.5}

    def nothing(mask):
        return {name: torch.zeros_like(bits) for name, bits in mask.items()}

    def frozen(mask):
        return mask | {"fixed": torch.ones(6, dtype=torch.bool)}

    return {
        "other model": (other, r"names 7 of 7 tensors that are no parameters.*another model"),
        "shape": (shape, r"first\.weight is \(6, 6\), its mask \(2, 6\).*another rank"),
        "unknown": (unknown, r"names 1 of 8.*first\.wieght \(nearest: first\.weight\)"),
        "values": (values, r"first\.weight must hold only False and True, or 0 and 1"),
        "nothing": (nothing, "selects no entry"),
        "frozen": (frozen, "1 frozen parameters: fixed.*requires_grad"),
        "empty": (lambda mask: {}, "at least one tensor"),
    }


def fingerprint(model):
    """Everything that a refused mask has to leave alone."""
    return (
        [
            (n, id(p), p.requires_grad, p.detach().clone().tolist())
            for n, p in model.named_parameters()
        ],
        [(n, id(b)) for n, b in model.named_buffers()],
        [n for n, _ in model.named_modules()],
        len(model._forward_pre_hooks) + len(model._forward_hooks) + len(model._state_dict_hooks),
        sorted(vars(model)),
    )


@pytest.mark.parametrize("case", wrong_masks())
def test_wrong_masks_are_refused(case):
    """Guards against a mask that is half applied, or applied to what it was not made for."""
    change, message = wrong_masks()[case]
    model = Net()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        apply_mask(model, change(net_mask(model)))
    assert fingerprint(model) == before
    assert get_mask(model) is None


def test_second_mask_is_refused():
    """Guards against a mask within a mask."""
    model, mask = masked_net()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"has a mask already: call remove_mask"):
        apply_mask(model, mask)
    assert fingerprint(model) == before


def test_no_attribute_of_a_module_is_taken():
    """Guards against a submodule of the user's that the mask silently replaces."""
    model, plain = Net(), Net()
    model.last.weight_values = own = nn.Linear(2, 2)
    plain.last.weight_values = nn.Linear(2, 2)
    apply_mask(model, net_mask(Net()))
    assert model.last.weight_values is own
    added = {UNSELECTED, "_apply", "_load_from_state_dict"}
    assert set(dir(model.last)) - set(dir(plain.last)) <= added


def test_remove_without_a_mask():
    """Guards against a removal that does nothing."""
    with pytest.raises(ValueError, match="no mask to remove"):
        remove_mask(Net())


@pytest.mark.parametrize("after_step", [False, True])
@pytest.mark.parametrize("part", ["base_model", "base_model.model", "base_model.model.bert"])
def test_forward_around_the_masked_model_trains(part, after_step):
    """Guards against gradients that are lost, or counted twice, where a part of it is called."""
    model, twin, mask = masked_pair(lora_bert())
    if after_step:
        dense_step(model, twin, mask, batch_for(model))
        model.zero_grad(), twin.zero_grad()
    batch = batch_for(model)
    if part.endswith("bert"):
        del batch["labels"]
    for each in (model, twin):
        output = each.get_submodule(part)(**batch)
        (sum_of(output) if part.endswith("bert") else output.loss).backward()
    for name, p in trainable(twin).items():
        if HEAD not in name:
            found = trainable(model)[name].grad.view(-1)
            torch.testing.assert_close(found, p.grad[mask[name]], rtol=1e-4, atol=1e-6)
    for name, p in trainable(twin).items():
        if p.grad is not None:
            p.grad *= mask[name]
    for each in (model, twin):
        torch.optim.SGD(trainable(each).values(), 0.5).step()
    assert_same(model, twin, mask, 1e-5)


def test_a_frozen_masked_model_passes_gradients_through():
    """Guards against an error where nothing is to be trained, as in a frozen reward model."""
    model, _, _ = masked_pair(lora_bert())
    model.requires_grad_(False)
    embeddings = torch.randn(2, 5, 12, requires_grad=True)
    for module in (model, model.base_model.model):
        module(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.count_nonzero()
    assert all(values.grad is None for values in masked_parameters(model))


def test_data_parallel_replica_is_refused():
    """Guards against DataParallel, whose replicas' gradients reach nothing."""
    model, _ = masked_net()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel"):
        replica(inputs())


# Masks of all kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_masks_of_zeros_and_ones(dtype):
    """Guards against the first implementation's float masks being read otherwise."""
    model = lora_bert()
    mask = random_mask(model)
    apply_mask(model, {name: bits.to(dtype) for name, bits in mask.items()})
    assert get_mask(model) == FishMask(mask)


def test_all_true_and_all_false_and_left_out():
    """Guards against whole tensors that turn into values, and unselected ones that are trained."""
    model = lora_bert()
    names = [n for n in trainable(model) if HEAD not in n]
    mask = {n: bits for n, bits in random_mask(model).items() if HEAD not in n}
    mask[names[0]].fill_(True)
    mask[names[1]].zero_()
    before, whole = tensors_of(model, trainable(model)), trainable(model)[names[0]]
    apply_mask(model, mask)
    assert trainable(model)[names[0]] is whole
    k = sum(int(bits.sum()) for bits in mask.values())
    head = sum(t.numel() for n, t in before.items() if HEAD in n)
    assert sum(p.numel() for p in trainable(model).values()) == k + head
    train(model, 3)
    assert_frozen_kept(model, mask, before)
    for name in [names[0], *(n for n in before if HEAD in n)]:
        assert (tensor_of(model, name) != before[name]).all(), name
    assert get_mask(model) == FishMask(mask)


def test_all_false_for_a_frozen_parameter_is_fine():
    """Guards against refusing a mask that says of a frozen tensor what is true."""
    model = Net()
    mask = net_mask(model) | {"fixed": torch.zeros(6)}
    apply_mask(model, mask)
    train_net(model)
    remove_mask(model)
    assert not model.fixed.requires_grad
    assert torch.equal(model.fixed, Net().fixed)


def test_a_mask_that_selects_everything():
    """Guards against a model without groups that cannot be trained, saved or freed again."""
    model = Net()
    before = fingerprint(model)[0]
    apply_mask(model, {n: torch.ones_like(p) for n, p in trainable(model).items()})
    assert masked_parameters(model) == []
    assert get_mask(model).density == 1
    assert fingerprint(model)[0] == before
    train_net(model)
    remove_mask(model)


def test_parameters_of_different_types_and_shapes():
    """Guards against groups that mix types, and scalars and empty tensors that have no view."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_double = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
            self.a_half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
            self.turned = nn.Parameter(torch.ones(4, 3).t())
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.empty = nn.Parameter(torch.ones(0, 3))

        def forward(self):
            parts = (self.a_double, self.a_half, self.turned, self.scalar, self.empty)
            return sum(part.double().square().sum() for part in parts)

    model = Mixed()
    mask = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    mask["a_double"][1, 0] = mask["a_half"][2] = mask["turned"][2, 3] = 1
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    apply_mask(model, mask)
    model().backward()
    torch.optim.SGD(trainable(model).values(), 0.25).step()
    for name, bits in mask.items():
        expected = (2.0 if name == "scalar" else 1.0) - 0.5 * bits
        assert tensor_of(model, name).dtype == dtypes[name], name
        assert torch.equal(tensor_of(model, name), expected.to(dtypes[name])), name


# Casts, loads, copies


def train_net(model, steps=3, dtype=torch.float32):
    optimizer = torch.optim.AdamW(trainable(model).values(), LR, weight_decay=DECAY)
    for i in range(steps):
        optimizer.zero_grad()
        model(inputs(i, dtype)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_casting_a_masked_model(dtype):
    """Guards against tensors that part from the values when the model is cast or moved."""
    model, mask = masked_net()
    twin, _ = masked_net()
    remove_mask(twin.to(dtype))
    twin = apply_mask(twin, mask)
    model.to(dtype)
    before = tensors_of(model, mask)
    assert {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()} == {
        dtype
    }
    # Before any forward in the new type: the tensors are what the values are written to.
    for values in masked_parameters(model):
        values.grad = torch.ones_like(values)
    torch.optim.SGD(masked_parameters(model), 0.5).step()
    for name, bits in mask.items():
        if not bits.all():
            difference = (before[name] - tensor_of(model, name)).float()
            torch.testing.assert_close(difference, 0.5 * bits.float(), rtol=0, atol=0.01)
    for values in masked_parameters(model):
        values.data += 0.5
    train_net(model, dtype=dtype), train_net(twin, dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 0.1
    assert_same(model, twin, mask, tolerance)
    remove_mask(model)
    assert {p.dtype for p in model.parameters()} == {dtype}


def load_by_module(model, state):
    """As the adapters library loads: no hook runs afterwards."""
    for path, module in model.named_modules():
        module._load_from_state_dict(state, f"{path}." if path else "", {}, True, [], [], [])


@pytest.mark.parametrize("how", ["copied", "assigned", "by-module"])
def test_load_state_dict(how):
    """Guards against values that overwrite what was loaded, at the next forward."""
    model, mask = masked_net()
    source = Net()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.rand_like(p))
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    if how == "by-module":
        load_by_module(model, state)
    else:
        model.load_state_dict(state, strict=True, assign=how == "assigned")
    with torch.no_grad():
        assert torch.equal(model(inputs()), source(inputs()))
    for name in mask:
        assert torch.equal(tensor_of(model, name), tensor_of(source, name)), name
    train_net(model), train_net(apply_mask(source, mask))
    assert_same(model, source, mask)
    remove_mask(model)
    for name in mask:
        assert torch.equal(tensor_of(model, name), tensor_of(source, name)), name


def test_state_dict_is_that_of_the_plain_model():
    """Guards against names of the values, missing names, and live views that change afterwards."""
    model, _ = masked_net()
    plain = Net().state_dict()
    state = model.state_dict()
    assert state.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(state[name], tensor), name
    # Tied names share a tensor; others do not, or they would look tied to whoever saves them.
    assert state["first.weight"].data_ptr() == state["again.weight"].data_ptr()
    masked = ("first.weight", "first.bias", "root", "last.weight", "norm.bias")
    assert len({state[n].untyped_storage().data_ptr() for n in masked}) == len(masked)
    wrapped = nn.ModuleDict({"inner": model})
    assert wrapped.state_dict().keys() == {f"inner.{name}" for name in plain}
    wrapped.load_state_dict(wrapped.state_dict(), strict=True)


def test_wrong_state_dict_is_refused():
    """Guards against strict loading that no longer is."""
    model, _ = masked_net()
    state = model.state_dict()
    del state["root"]
    with pytest.raises(RuntimeError, match=r"Missing key.*root"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        model.load_state_dict(model.state_dict() | {"other": torch.ones(1)})


def copied(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("when", ["fresh", "after a forward", "after training"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_independently(how, when, tmp_path):
    """Guards against a copy that trains, saves or removes the original's mask, or its own not."""
    model, twin, mask = masked_pair(lora_bert())
    if when == "after a forward":
        model(**batch_for(model)).loss.backward()
        model.zero_grad()
    elif when == "after training":
        train(model, 2)
    before = tensors_of(model, mask)
    clone = copied(model, how)
    assert get_mask(clone) == FishMask(mask)
    if when != "after training":
        dense_step(clone, twin, mask, batch_for(clone))
        assert_same(clone, twin, mask)
    train(clone, 2)
    assert_frozen_kept(clone, mask, before)
    for name, tensor in before.items():
        assert torch.equal(tensor_of(model, name), tensor), name
        assert not torch.equal(tensor_of(clone, name), tensor), name
    saved(clone, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    with torch.no_grad():
        batch = batch_for(model)
        assert torch.equal(loaded(**batch).logits, clone(**batch).logits)
    remove_mask(clone)
    assert get_mask(clone) is None
    assert get_mask(model) == FishMask(mask)
    if when != "after a forward":
        for m in (model, copied(model, how)):
            m.train(), m.state_dict(), m.zero_grad()
            sum_of(m.base_model.model.bert(batch["input_ids"])).backward()
            assert all(values.grad.count_nonzero() for values in masked_parameters(m))
    train(model, 1)
    assert all(not torch.equal(tensor_of(model, n), t) for n, t in before.items())


# And back


def test_remove_mask_gives_the_model_back(tmp_path):
    """Guards against parameters in another order, of other values, or a patch that stays."""
    model, twin, mask = masked_pair(lora_bert())
    names = [(n, p.shape, p.requires_grad) for n, p in twin.named_parameters()]
    modules = [n for n, _ in twin.named_modules()]
    buffers = [n for n, _ in twin.named_buffers()]
    train(model)
    trained = tensors_of(model, mask)
    assert remove_mask(model) is model
    assert [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()] == names
    assert [n for n, _ in model.named_modules()] == modules
    assert [n for n, _ in model.named_buffers()] == buffers
    for name, tensor in trained.items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert "save_pretrained" not in vars(model)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not model._state_dict_hooks and not model._state_dict_pre_hooks
    assert not any(m._load_state_dict_post_hooks for m in model.modules())
    assert not any(m._load_state_dict_pre_hooks for m in model.modules())
    assert not any(UNSELECTED in vars(m) for m in model.modules())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "fish_mask.json").exists()
    train(model, 2)
    assert all((model.get_parameter(n) != t).any() for n, t in trained.items())
    for name, bits in mask.items():
        if not bits.all():
            assert (model.get_parameter(name)[~bits] != trained[name][~bits]).any(), name


def test_remove_mask_before_any_forward():
    """Guards against values set by hand that are lost with the mask; orders of the root too."""
    model, mask = masked_net()
    with torch.no_grad():
        for values in masked_parameters(model):
            values.fill_(7)
    remove_mask(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in Net().named_parameters()]
    for name, bits in mask.items():
        if not bits.all():
            assert (model.get_parameter(name)[bits] == 7).all()
            assert torch.equal(model.get_parameter(name)[~bits], Net().get_parameter(name)[~bits])
    assert model.first is model.again


def test_apply_train_remove_many_times():
    """Guards against states that hooks or the list of live masks keep in memory."""
    model = Net()
    mask = net_mask(model)

    def cycle():
        apply_mask(model, mask)
        train_net(model, 1)
        model.state_dict()
        state = weakref.ref(state_of(model))
        remove_mask(model)
        return state

    tracemalloc.start()
    try:
        # Interpreter and libraries fill caches of their own first.
        for _ in range(100):
            cycle()
        gc.collect()
        start, _ = tracemalloc.get_traced_memory()
        states = []
        for _ in range(100):
            states.append(cycle())
        gc.collect()
        assert not any(state() for state in states)
        end, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert end - start < 100 * 1024
    assert len(_live) < 100


def test_masked_models_are_freed():
    """Guards against masked models that live on after their last reference."""
    model, _ = masked_net()
    train_net(model, 1)
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None


# torch.compile


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.layers(x))


def lora_mlp():
    torch.manual_seed(1)
    config = LoraConfig(r=3, target_modules=["0", "2", "out"], init_lora_weights=False)
    return get_peft_model(Mlp(), config)


def six_steps(masked, compiled):
    """Weights and outputs after six accumulated, evaluated steps; graphs by step, breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = lora_mlp()
    names = list(trainable(model))
    if masked:
        apply_mask(model, random_mask(model))
    run = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.AdamW(trainable(model).values(), 0.05, weight_decay=DECAY)
    outputs, graphs = [], []
    counters = torch._dynamo.utils.counters
    for i in range(6):
        optimizer.zero_grad()
        for part in range(2):
            run(inputs(2 * i + part)).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            outputs.append(run(inputs(i)))
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())
    return tensors_of(model, names), outputs, graphs, breaks


def test_compiled_training():
    """Guards against graph breaks, recompilations and stale values under torch.compile."""
    eager, eager_outputs, _, _ = six_steps(True, False)
    weights, outputs, graphs, breaks = six_steps(True, True)
    plain_eager, _, _, _ = six_steps(False, False)
    plain, _, plain_graphs, plain_breaks = six_steps(False, True)
    torch._dynamo.reset()

    def apart(a, b):
        return max(float((a[n] - b[n]).abs().max()) for n in a)

    assert breaks == plain_breaks == 0
    # One with and one without gradients.
    assert graphs == plain_graphs == [2] * 6
    assert apart(weights, eager) <= max(1e-6, apart(plain, plain_eager))
    torch.testing.assert_close(outputs, eager_outputs)
    assert apart(eager, plain_eager) > 1e-2


def test_remove_mask_of_a_compiled_model():
    """Guards against a removal through a wrapper that leaves half of the mask."""
    model, twin, mask = masked_pair(lora_bert())
    compiled = torch.compile(model, backend="aot_eager")
    assert get_mask(compiled) == FishMask(mask)
    assert remove_mask(compiled) is compiled
    assert get_mask(model) is None
    assert "save_pretrained" not in vars(model)
    assert fingerprint(model)[2:4] == fingerprint(twin)[2:4]


def test_dense_gradients_do_not_wait_for_the_end_of_the_backward_pass(monkeypatch):
    """Guards a model's own weights, of which all dense gradients would be alive at once."""
    monkeypatch.setattr(storage, "GROUP_ENTRIES", 1)
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    apply_mask(layers, random_mask(layers, dense=None))
    events = []
    for i, values in enumerate(masked_parameters(layers)):
        values.register_post_accumulate_grad_hook(lambda _, i=i: events.append(("values", i)))
    for i, layer in enumerate(layers):
        layer.register_full_backward_hook(lambda *_, i=i: events.append(("layer", i)))
    layers(torch.ones(2, 4, requires_grad=True)).sum().backward()
    for i in range(1, 4):
        assert events.index(("values", i)) < events.index(("layer", i - 1))


def test_adalora_is_refused():
    """Guards frozen entries against an adapter that rewrites them itself."""
    model = get_peft_model(
        tiny_bert(),
        AdaLoraConfig(
            task_type="SEQ_CLS", init_r=4, target_r=2, total_step=9, target_modules=["query"]
        ),
    )
    names = list(trainable(model))
    outer = nn.Sequential(model)
    with pytest.raises(ValueError, match="AdaLoRA"):
        apply_mask(outer, random_mask(outer))
    with pytest.raises(ValueError, match=r"AdaLoRA moves its own budget .* without a mask"):
        apply_mask(model, random_mask(model))
    assert list(trainable(model)) == names
    head = {name: bits for name, bits in random_mask(model, dense=None).items() if HEAD in name}
    assert get_mask(apply_mask(model, head)) == FishMask(head)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_are_refused(register):
    """Guards against gradients that a method changes (CPT, OSF), and that a mask would not."""
    model = Net()
    getattr(model.root, register)(lambda _: None)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"^1 tensors .* gradient hooks.*: root\. Select"):
        apply_mask(model, net_mask(model))
    assert fingerprint(model) == before
    apply_mask(model, net_mask(model) | {"root": torch.ones(6, 6)})
    assert masked_parameters(model)
