"""Methods of the adapters library under a mask, like PEFT's in tests.methods_table.

The library needs an older transformers, so this has its own environment: `make
test-adapters` builds it. docs/adapters.md is written there by

    .venv-adapters/bin/python -m tests.adapters_table > docs/adapters.md
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import torch

from fish_tuning import (
    FishMask,
    apply_mask,
    calculate_fisher_information,
    create_mask_from_fisher,
)
from tests.methods_table import (
    DENSITY,
    ONE_BY_ONE,
    STEPS,
    YES,
    assert_trained,
    changes_of,
    logged,
    output,
    own_loss,
    seeded,
    state_of,
    train,
    trainable,
    write_page,
)
from tests.models import (
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)
from tests.rounding import float32_rtol, nudged

NONE = "adapters has none"
NAME = "ours"


def _bert() -> Any:
    return tiny_bert(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)


@dataclass(frozen=True)
class Method:
    """A row: a config of the adapters library, and the model that gets it."""

    name: str
    config: Callable[[], Any]
    base: Callable[[], Any] = _bert


def _compacter(kind: Any) -> Any:
    return kind(reduction_factor=3, phm_dim=2)


def _gated() -> Any:
    """UniPELT's three methods, each with its gate."""
    return adapters.UniPELTConfig(
        prefix_tuning=adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6),
        adapter=adapters.SeqBnConfig(reduction_factor=3),
        lora=adapters.LoRAConfig(r=4, alpha=4),
    )


def _mix_and_match() -> Any:
    return adapters.MAMConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6),
        adapters.ParBnConfig(reduction_factor=2),
    )


METHODS = (
    Method("Bottleneck (Pfeiffer), `seq_bn`", lambda: adapters.SeqBnConfig(reduction_factor=3)),
    Method("`seq_bn`, GPT-2", lambda: adapters.SeqBnConfig(reduction_factor=3), tiny_gpt2),
    Method("`seq_bn`, Llama", lambda: adapters.SeqBnConfig(reduction_factor=3), tiny_llama),
    Method("`seq_bn_inv`", lambda: adapters.SeqBnInvConfig(reduction_factor=3)),
    Method(
        "Bottleneck (Houlsby), `double_seq_bn`",
        lambda: adapters.DoubleSeqBnConfig(reduction_factor=3),
    ),
    Method("Parallel, `par_bn`", lambda: adapters.ParBnConfig(reduction_factor=2)),
    Method(
        "Parallel, learned scaling",
        lambda: adapters.ParBnConfig(reduction_factor=2, scaling="learned"),
    ),
    Method(
        "AdapterPlus",
        # Without stochastic depth, which needs torchvision.
        lambda: adapters.AdapterPlusConfig(reduction_factor=3, stochastic_depth=0.0),
    ),
    Method("Compacter", lambda: _compacter(adapters.CompacterConfig)),
    Method("Compacter++", lambda: _compacter(adapters.CompacterPlusPlusConfig)),
    Method(
        "Prefix tuning",
        lambda: adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6),
    ),
    Method("Prefix tuning, flat", lambda: adapters.PrefixTuningConfig(flat=True, prefix_length=3)),
    Method("Prompt tuning", lambda: adapters.PromptTuningConfig(prompt_length=3)),
    Method("LoRA", lambda: adapters.LoRAConfig(r=4, alpha=4)),
    Method("LoRA, GPT-2", lambda: adapters.LoRAConfig(r=4, alpha=4), tiny_gpt2),
    Method("DoRA", lambda: adapters.DoRAConfig(r=4, alpha=4)),
    Method("VeRA", lambda: adapters.VeraConfig(r=4)),
    Method("IA3", adapters.IA3Config),
    Method("LoReFT", lambda: adapters.LoReftConfig(r=2)),
    Method("NoReFT", lambda: adapters.NoReftConfig(r=2)),
    Method("DiReFT", lambda: adapters.DiReftConfig(r=2)),
    Method("UniPELT", _gated),
    Method("Mix-and-match, `mam`", _mix_and_match),
)


def build(method: Method) -> Any:
    """The model with its adapter, in evaluation mode; every trainable entry moved off its start."""
    return seeded(_build, method)


def _build(method: Method) -> Any:
    model = method.base().eval()
    adapters.init(model)
    model.add_adapter(NAME, method.config())
    model.train_adapter(NAME)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def outcomes(method: Method, folder: Path) -> dict[str, str]:
    """The outcome of each step, by step; a wrong step fails an assertion."""
    model = build(method)
    examples = examples_for(model, 6)
    batches = batches_of(examples, 3)
    found = dict.fromkeys(STEPS, YES)

    with logged() as messages:
        scores = calculate_fisher_information(model, batches, progress=False)
    if any(ONE_BY_ONE in message for message in messages):
        found["scores"] = ONE_BY_ONE
    naive = functools.partial(naive_scores, model, examples, loss=own_loss)
    expected = naive()
    assert_scores_close(scores, expected, float32_rtol(model, naive, expected))

    k = round(DENSITY * sum(score.numel() for score in scores.values()))
    mask = create_mask_from_fisher(scores, num_trainable=k, scope="per_tensor")
    start = state_of(model)
    names = {*model.state_dict()}
    apply_mask(model, mask)
    assert sum(p.numel() for p in trainable(model).values()) == k
    assert {*model.state_dict()} == names

    plain = build(method)
    files = saved(plain, folder / "plain")
    train(model, batches)
    reference = build(method)
    train(reference, batches, mask)
    other = build(method)
    with nudged(other, seed=0):
        train(other, batches, mask)
        changes = changes_of(reference, other)
    assert_trained(model, reference, mask, start, changes)

    assert saved(model, folder / "masked") == files
    assert FishMask.from_pretrained(folder / "masked") == mask
    outputs = output(model, batches[0])
    assert not torch.allclose(outputs, output(plain, batches[0]), atol=1e-4)
    for step, bring in (("load", load), ("merge", merge)):
        if torch.allclose(
            output(bring(method, plain, folder / "plain"), batches[0]),
            output(plain, batches[0]),
            rtol=1e-4,
            atol=1e-5,
        ):
            brought = bring(method, model, folder / "masked")
            torch.testing.assert_close(output(brought, batches[0]), outputs, rtol=1e-4, atol=1e-5)
        else:
            found[step] = NONE
    return found


def load(method: Method, model: Any, folder: Path) -> Any:
    """Another model with what save_adapter wrote of this one."""
    other = method.base()
    adapters.init(other)
    other.set_active_adapters(other.load_adapter(str(folder)))
    return other


def merge(method: Method, model: Any, folder: Path) -> Any:
    """A plain transformers model with the weights of this one, merged if possible."""
    with contextlib.suppress(ValueError):  # a gate cannot
        model.merge_adapter(NAME)
    plain = method.base()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    return plain


def saved(model: Any, folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and types of all tensors in the weight files that save_adapter writes.

    In its default format: safetensors refuses what prefix tuning holds twice.
    """
    model.save_adapter(str(folder), NAME)
    found = {
        f"{file.name}: {name}": (tensor.shape, tensor.dtype)
        for file in sorted(folder.glob("*.bin"))
        for name, tensor in torch.load(file, weights_only=True).items()
    }
    assert found
    return found


def page(rows: Mapping[str, Mapping[str, str]]) -> str:
    """docs/adapters.md, from the outcomes by method."""
    lines = ["| method | " + " | ".join(STEPS) + " |", "|---" * (len(STEPS) + 1) + "|"]
    lines += ["| " + " | ".join([name, *found.values()]) + " |" for name, found in rows.items()]
    return _INTRODUCTION.format(version=adapters.__version__) + "\n".join(lines) + "\n"


_INTRODUCTION = """# The adapters library

Bottleneck adapters, UniPELT and related methods come from the
[adapters](https://docs.adapterhub.ml) library. A model prepared by it is scored, masked and
trained like any other.

```console
$ pip install 'fish-tuning[adapters]'
```

adapters 1.3 needs transformers 4.57. fish-tuning runs on it too, and `make test-adapters` tests
this. The extras `experiments` and `quickstart`, and therefore `fish-tuning run`, need
transformers 5: they cannot be combined with `adapters`, and pip says so.

```python
import adapters
from adapters import AdapterTrainer
from fish_tuning import FishTuningCallback, calculate_fisher_information, create_mask_from_fisher

adapters.init(model)  # any model of transformers
model.add_adapter("ours", config="unipelt")
model.train_adapter("ours")

scores = calculate_fisher_information(model, loader)
mask = create_mask_from_fisher(scores, num_trainable=56_000, names_to_exclude=["classifier"])
trainer = AdapterTrainer(model, args, train_dataset=train, callbacks=[FishTuningCallback(mask)])
trainer.train()
model.save_adapter("adapter", "ours")  # the adapter's own files, and the mask beside them
```

`FishTuningTrainer` can train such a model too. It saves the whole model, while `AdapterTrainer`
saves the adapter. `load_adapter` loads values into a masked model like into any other. To
continue training, load the adapter, call `train_adapter`, and then `apply_mask(model,
FishMask.from_pretrained("adapter"))`.

- LoRA starts at B = 0 here too; `score_with_perturbed_b` and `scope="balanced"` recognize its two
  sides.
- `par_bn`, and therefore `mam`, starts with an up-projection of 0, where the down-projection
  scores 0: score after a few steps.
- Where LoRA has a gate (UniPELT), the gate has no information while B = 0.

## Methods

What works with each method of adapters {version} on a tiny model. `.venv-adapters/bin/python -m
tests.adapters_table > docs/adapters.md` writes this page, and `make test-adapters` repeats this
and compares. The columns are those of [PEFT's methods](methods.md), with `save_adapter`,
`load_adapter` and, for **merge**, a plain transformers model that is given the base weights after
`merge_adapter`.

"{none}" means that adapters cannot do it without a mask either, or that the outputs change when
it does. (It does not save one setting of DiReFT.)

""".replace("{none}", NONE)


if __name__ == "__main__":
    write_page(METHODS, outcomes, page)
