"""Training under DeepSpeed's engines, in two processes on the processor: `make test-deepspeed`."""

import copy
import os
import signal
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing import ProcessExitedException
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

from fish_tuning import (
    FishConfig,
    FishMask,
    FishTuningTrainer,
    apply_mask,
    calculate_fisher_information,
    create_mask_from_fisher,
    get_mask,
    mask_trainer,
    remove_mask,
    score_with_perturbed_b,
)
from tests.models import batches_of, examples_for, pad, tiny_bert, tiny_llama, with_lora
from tests.parallel import (
    STEPS,
    assert_equal_scores,
    assert_identical,
    assert_same_weights,
    error_of,
    labelled_alike,
    lora_bert,
    optimizer_for,
    random_mask,
    scored,
    tensors_of,
    trainable,
)
from tests.processes import in_processes
from tests.training import WORDS, tiny_tokenizer

# Imported in the processes alone: it is slow, and asks for the accelerator once and for all.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def settings(stage, **others):
    """Both without a limit to gradients, which is 1 where DeepSpeed is not told otherwise."""
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        **others,
    }


def on_the_processor():
    """To be called in each process before DeepSpeed is imported."""
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    # Its communication through shared memory would be compiled now; without it, gloo is used.
    vars(import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None


def prepared(model, config):
    """The engine, the optimizer and the accelerator."""
    on_the_processor()
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    return *accelerator.prepare(model, optimizer_for(model)), accelerator


def all_parameters(model):
    """Within it, all processes hold those that ZeRO-3 has divided."""
    return import_module("deepspeed").zero.GatheredParameters(list(model.parameters()))


def batch_for(model, step):
    """Every example counts alike: those of language models have labels everywhere."""
    batch = labelled_alike(model, step)
    return batch if batch["labels"].dim() == 1 else {**batch, "labels": batch["input_ids"]}


def step_of(engine, accelerator, model, rank, step, size=2):
    batch = batch_for(model, step)
    part = {key: value[rank * size : (rank + 1) * size] for key, value in batch.items()}
    accelerator.backward(engine(**part).loss)  # Steps too.


def train_zero(rank, model, mask, config):
    apply_mask(model, mask)
    engine, optimizer, accelerator = prepared(model, config)
    by_step, logits = [], []
    for step in range(STEPS):
        step_of(engine, accelerator, model, rank, step)
        by_step.append(tensors_of(model, mask))
        with torch.no_grad():  # Around the model that was masked, as generation goes.
            logits.append(model.base_model.model(**labelled_alike(model, 0)).logits)
    state = optimizer.optimizer.optimizer.state
    held = sum(len(each["exp_avg"]) for each in state.values())
    saved = {name: value for name, value in model.state_dict().items() if name in mask}
    errors = [
        error_of(call, each, argument)
        for each in (engine, remove_mask(model))
        for call, argument in ((scored, []), (apply_mask, mask))
    ]
    return by_step, logits, saved, held, errors


@pytest.mark.parametrize(("stage", "clipping"), [(1, 0.0), (2, 0.05)])
def test_zero_trains_as_one_process(stage, clipping, tmp_path):
    """Guards against tensors that lag behind the values, which ZeRO writes when the optimizer's
    hooks are over, against an optimizer of more than k values, and against a mask on a model
    whose parameters DeepSpeed holds already."""
    model = lora_bert()
    mask = random_mask(model)
    one = apply_mask(copy.deepcopy(model), mask)
    before = tensors_of(one, mask)
    config = settings(stage, gradient_clipping=clipping)
    by_rank = in_processes(2, tmp_path / "a", train_zero, model, mask, config)
    optimizer = optimizer_for(one)
    for step in range(STEPS):
        loss = one(**labelled_alike(one, step)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable(one).values(), clipping or 1e9)
        assert norm > clipping
        optimizer.step()
        optimizer.zero_grad()
        assert_same_weights(
            [by_step[step] for by_step, *_ in by_rank], tensors_of(one, mask), before
        )
        with torch.no_grad():
            expected = one(**labelled_alike(one, 0)).logits
        for _, logits, *_ in by_rank:
            torch.testing.assert_close(logits[step], expected, rtol=1e-5, atol=1e-5)
    k = get_mask(one).num_trainable
    assert k <= sum(held for *_, held, _ in by_rank) < k + 8  # Parts of equal size.
    for by_step, _, saved, _, errors in by_rank:
        assert_identical([by_step[-1], saved])
        for name, bits in mask.items():
            assert torch.equal(saved[name][~bits], before[name][~bits]), name
        for kind, message in errors:
            assert kind == "ValueError" and message.endswith("before you prepare it")


def train(rank, model, mask, config):
    apply_mask(model, mask)
    engine, _, accelerator = prepared(model, config)
    for step in range(STEPS):
        step_of(engine, accelerator, model, rank, step)
    with all_parameters(model):
        return tensors_of(model, mask)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16(stage, tmp_path):
    """Guards against float32 tensors around values that DeepSpeed has cast, as it casts
    parameters alone."""
    model = lora_bert()
    mask = random_mask(model)
    mask[next(iter(mask))].zero_()  # One tensor is not selected from at all.
    before = tensors_of(model, mask)
    precise = in_processes(2, tmp_path / "a", train, model, mask, settings(stage))
    config = settings(stage, bf16={"enabled": True})
    by_rank = in_processes(2, tmp_path / "b", train, model, mask, config)
    assert_identical(by_rank)
    for name, bits in mask.items():
        tensor = by_rank[0][name]
        assert tensor.dtype == torch.bfloat16, name
        assert torch.equal(tensor[~bits], before[name][~bits].bfloat16()), name
        moved = (tensor - precise[0][name])[bits].abs().mean()
        assert not bits.any() or moved < 0.2 * (precise[0][name] - before[name])[bits].abs().mean()


def train_zero_3(rank, model, mask, config, count):
    size = sum(parameter.numel() for parameter in model.parameters())
    apply_mask(model, mask)
    if count == 4:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, optimizer, accelerator = prepared(model, config)
    held = sum(p.ds_tensor.numel() for p in model.parameters())
    by_step, logits = [], []
    for step in range(20):
        step_of(engine, accelerator, model, rank, step, 4 // count)
        # The head is selected as a whole, and divided like the base model.
        by_step.append(tensors_of(model, {n: b for n, b in mask.items() if not b.all()}))
        with torch.no_grad():
            logits.append(engine(**labelled_alike(model, 0)).logits)
        if step % 3 == 0:  # Divides the values again.
            optimizer.optimizer.checkpoint_event_prologue()
    state = optimizer.optimizer.optimizer.state
    moments = sum(len(each["exp_avg"]) for each in state.values())
    with all_parameters(model):
        tensors = tensors_of(model, mask)
    errors = [
        error_of(call, each, *arguments)
        for each in (engine, model)
        for call, *arguments in (
            (scored, []),
            (apply_mask, mask),
            (remove_mask,),
            (lambda each: (getattr(each, "module", each)).save_pretrained("nowhere"),),
        )
    ]
    return by_step, logits, tensors, held / size, moments, errors


@pytest.mark.parametrize(("count", "persistent", "clipping"), [(2, 100_000, 0.05), (4, 0, 0.0)])
def test_zero_3_trains_as_one_process(count, persistent, clipping, tmp_path):
    """Guards against values that a process does not hold when a forward pass begins, against
    tensors that lag behind them, and against base models that stay complete."""
    model = lora_bert()
    mask = random_mask(model)
    one = apply_mask(copy.deepcopy(model), mask)
    before = tensors_of(one, mask)
    config = settings(3, gradient_clipping=clipping, train_micro_batch_size_per_gpu=4 // count)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
    arguments = train_zero_3, model, mask, config, count
    by_rank = in_processes(count, tmp_path / "a", *arguments)
    optimizer = optimizer_for(one)
    for step in range(20):
        one(**labelled_alike(one, step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(one).values(), clipping or 1e9)
        optimizer.step()
        optimizer.zero_grad()
        split = {name: bits for name, bits in mask.items() if not bits.all()}
        tensors = [by_step[step] for by_step, *_ in by_rank]
        assert_same_weights(tensors, tensors_of(one, split), before)
        with torch.no_grad():
            expected = one(**labelled_alike(one, 0)).logits
        for _, logits, *_ in by_rank:
            torch.testing.assert_close(logits[step], expected, rtol=1e-5, atol=1e-5)
    assert_same_weights([tensors for _, _, tensors, *_ in by_rank], tensors_of(one, mask), before)
    k = get_mask(one).num_trainable
    assert k <= sum(moments for *_, moments, _ in by_rank) < k + count * len(mask)
    for *_, share, _, errors in by_rank:
        assert share < 1.1 / count
        for scoring, masking, removing, saving in (errors[:4], errors[4:]):
            for kind, message in (scoring, masking):
                assert kind == "ValueError" and "before the engine takes the model" in message
            assert removing[0] == "RuntimeError" and "cannot be taken off" in removing[1]
            assert saving[0] == "RuntimeError" and "get_state_dict(engine)" in saving[1]


def checkpointed(rank, folder, model, mask, stage):
    config = settings(stage)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    apply_mask(model, mask)
    engine, _, accelerator = prepared(model, config)
    gathered = accelerator.get_state_dict(engine)  # Before the first forward pass, too.
    for step in range(2):
        step_of(engine, accelerator, model, rank, step)
    engine.save_checkpoint(str(folder))
    if stage == 3:
        engine.save_16bit_model(str(folder))
    with all_parameters(model):
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = accelerator.get_state_dict(engine)
    if rank == 0:
        assert list(gathered) == list(after)
        assert_identical([saved, {name: after[name] for name in saved}])
        model.save_pretrained(folder / "adapter", state_dict=after)
    for step in range(2, 4):
        step_of(engine, accelerator, model, rank, step)
    with all_parameters(model):
        return saved, tensors_of(model, mask)


def resumed(rank, folder, model, mask, stage):
    apply_mask(model, mask)
    engine, _, accelerator = prepared(model, settings(stage))
    engine.load_checkpoint(str(folder))
    for step in range(2, 4):
        step_of(engine, accelerator, model, rank, step)
    converted = import_module("deepspeed.utils.zero_to_fp32")
    with all_parameters(model):
        return tensors_of(model, mask), converted.get_fp32_state_dict_from_zero_checkpoint(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints(stage, tmp_path):
    """Guards against files with values under the names of their tensors, and against an engine
    that goes on with others than it has saved."""
    model, folder = lora_bert(), tmp_path / "saved"
    mask = random_mask(model)
    mask[next(iter(mask))].zero_()  # One tensor is not selected from at all.
    by_rank = in_processes(
        2, tmp_path / "a", checkpointed, folder, copy.deepcopy(model), mask, stage
    )
    saved = by_rank[0][0]
    arguments = folder, copy.deepcopy(model), mask, stage
    again = in_processes(2, tmp_path / "b", resumed, *arguments)
    assert_identical([tensors for _, tensors in by_rank] + [tensors for tensors, _ in again])
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert FishMask.from_pretrained(folder / "adapter") == FishMask(mask)
    for name, tensor in adapter.items():
        (whole,) = {name, *(n for n in mask if in_file(n) == name)} & saved.keys()
        assert torch.equal(tensor, saved[whole]), name
    if stage == 3:
        whole = torch.load(folder / "pytorch_model.bin")
        assert_identical([saved, {name: whole[name] for name in saved}])
    values = again[0][1]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(values, strict=False)
    apply_mask(model, mask).load_state_dict(values)
    assert_identical([saved, model.state_dict()])


def prepared_without_mask(rank, model, mask):
    engine, *_ = prepared(model, settings(3))
    return error_of(scored, engine, []), error_of(apply_mask, engine.module, mask)


def test_a_model_that_zero_3_has_divided_is_refused(tmp_path):
    """Guards against scoring or masking the empty tensors that ZeRO-3 leaves in a process."""
    model = lora_bert()
    for errors in in_processes(2, tmp_path / "a", prepared_without_mask, model, random_mask(model)):
        for kind, message in errors:
            assert kind == "ValueError" and message.startswith("DeepSpeed ZeRO-3 has divided")
            assert "before the engine takes the model" in message


def loaded_in_slices(folder, count, kind):
    """A model as transformers loads it with a config of stage 3."""
    on_the_processor()
    from transformers.integrations import HfDeepSpeedConfig

    config = settings(3, train_micro_batch_size_per_gpu=4 // count)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    kept = HfDeepSpeedConfig(config)
    return kind.from_pretrained(folder), config, kept


def scored_in_slices(rank, folder, batches, count, kind, checkpointing):
    base, config, _ = loaded_in_slices(folder, count, kind)
    model = with_lora(base, lora_dropout=0.0)
    base = [p for p in model.parameters() if not p.requires_grad]
    share = sum(p.ds_tensor.numel() for p in base) / sum(p.ds_numel for p in base)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    given = {name: p.detach().clone() for name, p in trainable(model).items()}
    scores = score_with_perturbed_b(model, batches, progress=False)
    held = max(p.numel() for p in base)
    mask = create_mask_from_fisher(scores, 0.3, scope="adaptive")
    apply_mask(model, mask)
    model.save_pretrained(folder.parent / f"start-{rank}")
    engine, _, accelerator = prepared(model, config)
    for step in range(20):
        step_of(engine, accelerator, model, rank, step, 4 // count)
    with all_parameters(model):
        return share, held, given, dict(scores), dict(mask), tensors_of(model, mask)


@pytest.mark.parametrize(
    ("count", "tiny", "checkpointing"),
    [
        (2, tiny_bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0), False),
        (2, tiny_llama(tie_word_embeddings=True), True),
        (4, tiny_llama(), False),
    ],
    ids=["bert", "tied llama", "llama"],
)
def test_a_model_that_was_divided_as_it_was_loaded(count, tiny, checkpointing, tmp_path):
    """Guards the usual order under ZeRO-3, in which no process ever holds the base model: scores,
    mask and 20 steps are those of one process."""
    tiny.save_pretrained(tmp_path / "m")
    kind = type(tiny)
    base = kind.from_pretrained(tmp_path / "m")
    batches = [pad(examples_for(base, 4, seed, shortest=4, longest=9)) for seed in (1, 2)]
    model = with_lora(base, lora_dropout=0.0)
    expected = score_with_perturbed_b(model, batches, progress=False)
    arguments = tmp_path / "m", batches, count, kind, checkpointing
    by_rank = in_processes(count, tmp_path / "a", scored_in_slices, *arguments)
    mask = create_mask_from_fisher(expected, 0.3, scope="adaptive")
    before = tensors_of(model, mask)
    for share, held, given, scores, found, _ in by_rank:
        assert share < 1.1 / count
        assert held == 0
        assert_identical([dict(trainable(model)), given])
        assert_equal_scores(scores, expected)
        assert_identical([dict(mask), found])
    one = apply_mask(model, mask)
    optimizer = optimizer_for(one)
    for step in range(20):
        one(**batch_for(one, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights([tensors for *_, tensors in by_rank], tensors_of(one, mask), before)
    assert FishMask.from_pretrained(tmp_path / "start-0") == mask


ADAPTERS = {
    "dora": lambda model: with_lora(model, use_dora=True, init_lora_weights=False),
    "embeddings": lambda model: with_lora(
        model, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False
    ),
    "ia3": lambda model: get_peft_model(
        model,
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "vera": lambda model: get_peft_model(model, VeraConfig(r=4, target_modules=["q_proj"])),
    "prompt": lambda model: get_peft_model(
        model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ),
}


def scored_with(adapter, base, batches):
    torch.manual_seed(0)
    model = ADAPTERS[adapter](base)
    scores = score_with_perturbed_b(model, batches, progress=False)
    return dict(trainable(model)), dict(scores)


def scored_with_all(rank, folder, batches):
    found = {}
    for adapter in ADAPTERS:
        base, *_ = loaded_in_slices(folder, 2, LlamaForCausalLM)
        found[adapter] = scored_with(adapter, base, batches)
    return found


def test_adapters_of_a_model_that_was_divided_as_it_was_loaded(tmp_path):
    """Guards layers that use weights of modules inside them, and those that run again: DeepSpeed
    and PEFT would gather weights within torch.func's transforms, which ended the process."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "m")
    batches = batches_of(examples_for(base, 5, shortest=4), 3)
    by_rank = in_processes(2, tmp_path / "a", scored_with_all, tmp_path / "m", batches)
    for adapter in ADAPTERS:
        base = LlamaForCausalLM.from_pretrained(tmp_path / "m")
        given, expected = scored_with(adapter, base, batches)
        for found in by_rank:
            assert_identical([given, found[adapter][0]])
            assert_equal_scores(found[adapter][1], expected)


class Reading(nn.Module):
    """Reads weights of modules beside or instead of calling them."""

    def __init__(self):
        super().__init__()
        self.lin, self.read, self.called = (nn.Linear(8, 8) for _ in range(3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.linear(self.lin(x), self.read.weight)
        x = self.called(x) / (1 + self.called.weight.norm())
        x, _ = self.attention(x, x, x)
        return self.head(x).mean(1)


def scores_of_reading(model):
    config = LoraConfig(r=2, target_modules=["lin", "head"], init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    loader = [(torch.randn(4, 5, 8), torch.arange(4) % 3) for _ in range(2)]

    def loss(outputs, batch):
        return F.cross_entropy(outputs, batch[1], reduction="none")

    return dict(calculate_fisher_information(model, loader, loss_fn=loss, progress=False))


def scored_reading(rank):
    on_the_processor()
    import deepspeed

    deepspeed.init_distributed("gloo")
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):
        model = Reading()
    whole = Reading()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole.load_state_dict(model.state_dict())
    return scores_of_reading(model), scores_of_reading(whole)


def test_weights_that_are_read_without_a_call(tmp_path):
    """Guards `nn.MultiheadAttention`, and norms of weights: those of an empty tensor are 0."""
    for scores, expected in in_processes(2, tmp_path / "a", scored_reading):
        assert_equal_scores(scores, expected)


def in_file(name):
    """The name under which PEFT saves a tensor."""
    return name.replace(".default.", ".").replace(".modules_to_save.", ".")


def before_training_arguments():
    """On the processor, transformers' Trainer knows nothing of gloo under DeepSpeed."""
    on_the_processor()
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def zero_arguments(folder, config, kind=TrainingArguments, **arguments):
    return kind(
        str(folder),
        deepspeed=config,
        accelerator_config={"use_configured_state": True},
        **trainer_settings(2),
        **arguments,
    )


def trainer_for(folder, model, mask, config, **arguments):
    before_training_arguments()
    return FishTuningTrainer(
        model=model,
        args=zero_arguments(folder, config, **arguments),
        train_dataset=examples_for(model, 12, shortest=6, longest=6),
        eval_dataset=examples_for(model, 4, seed=1, shortest=6, longest=6),
        mask=mask,
    )


class Kill(TrainerCallback):
    """The system ends this process in the fifth step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def trained_until_killed(rank, folder, model, mask, victims):
    trainer = trainer_for(folder, model, mask, settings(3, **AUTO))
    if rank in victims:
        trainer.add_callback(Kill())
    trainer.train()


def trained_on(rank, folder, model, mask):
    trainer = trainer_for(folder, model, mask, settings(3, **AUTO))
    trainer.train(resume_from_checkpoint=True)
    with all_parameters(trainer.model):
        return tensors_of(trainer.model, mask)


def trained_alone(model, mask, folder):
    trainer = FishTuningTrainer(
        model=copy.deepcopy(model),
        args=TrainingArguments(folder, use_cpu=True, **trainer_settings(4)),
        train_dataset=examples_for(model, 12, shortest=6, longest=6),
        eval_dataset=examples_for(model, 4, seed=1, shortest=6, longest=6),
        mask=mask,
    )
    before = tensors_of(trainer.model, mask)
    trainer.train()
    trainer.save_model()
    return trainer, before


@pytest.mark.parametrize("victims", [[1], [0, 1]], ids=["one", "all"])
def test_killed_processes_resume(victims, tmp_path):
    """Guards against checkpoints of ZeRO-3 that only processes resume from that ended well."""
    model, folder = lora_bert(), tmp_path / "two"
    mask = random_mask(model)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_processes(2, tmp_path / "a", trained_until_killed, folder, model, mask, victims)
    by_rank = in_processes(2, tmp_path / "b", trained_on, folder, copy.deepcopy(model), mask)
    one, before = trained_alone(model, mask, tmp_path / "one")
    assert_same_weights(by_rank, tensors_of(one.model, mask), before)


def trained_own_weights(rank, folder, model, mask):
    error = error_of(trainer_for, folder, copy.deepcopy(model), mask, settings(3, **AUTO))
    config = settings(3, **AUTO)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    trainer = trainer_for(folder, model, mask, config)
    trainer.train()
    trainer.save_model()
    return error


def test_own_weights_under_zero_3(tmp_path):
    """Guards against a model without an adapter that is saved without its weights, or with values
    in the place of a tied embedding."""
    model = tiny_bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    for layer in model.bert.encoder.layer:
        layer.attention.self.key.bias.requires_grad_(False)  # Its gradients are all rounding.
    mask = random_mask(model, density=0.05)
    trained_alone(model, mask, tmp_path / "one")
    arguments = tmp_path / "two", copy.deepcopy(model), mask
    for kind, message in in_processes(2, tmp_path / "a", trained_own_weights, *arguments):
        assert kind == "ValueError" and "stage3_gather_16bit_weights_on_model_save" in message
    expected, saved = (load_file(tmp_path / each / "model.safetensors") for each in ("one", "two"))
    assert expected.keys() == saved.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert FishMask.from_pretrained(tmp_path / "two") == FishMask(mask)


def trainer_settings(batch_size):
    return {
        "max_steps": 6,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "average_tokens_across_devices": False,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        # TRL has other defaults than transformers; its checkpointing is reentrant with ZeRO-3.
        "bf16": False,
        "gradient_checkpointing": False,
    }


AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def trained_with_trainer(rank, folder, model, mask, stage):
    config = settings(stage, **AUTO)
    trainer = trainer_for(folder, copy.deepcopy(model), mask, config)
    trainer.train()
    trainer.save_model()
    with all_parameters(trainer.model):
        tensors = tensors_of(trainer.model, mask)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return tensors, losses


def resumed_with_trainer(rank, folder, model, mask, stage):
    config = settings(stage, **AUTO)
    other = {name: bits.flip(0) for name, bits in mask.items()}
    checkpoint = str(folder / "checkpoint-2")
    trainer = trainer_for(folder, copy.deepcopy(model), other, config)
    refused = error_of(trainer.train, resume_from_checkpoint=checkpoint)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    best["greater_is_better"] = False
    trainer = trainer_for(folder, copy.deepcopy(model), mask, config, **best)
    trainer.train(resume_from_checkpoint=checkpoint)
    saved = load_file(folder / "checkpoint-6" / "adapter_model.safetensors")
    at = trainer.state.best_model_checkpoint
    with all_parameters(trainer.model):
        return refused, saved, at, tensors_of(trainer.model, mask)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trainer(stage, tmp_path):
    """Guards against a Trainer that evaluates or saves other values than it has trained, and
    checkpoints from which it goes on with others."""
    model = lora_bert()
    mask = random_mask(model)
    alone, before = trained_alone(model, mask, tmp_path / "one")
    expected = [entry["eval_loss"] for entry in alone.state.log_history if "eval_loss" in entry]
    arguments = tmp_path / "two", model, mask, stage
    by_rank = in_processes(2, tmp_path / "a", trained_with_trainer, *arguments)
    assert_same_weights([tensors for tensors, _ in by_rank], tensors_of(alone.model, mask), before)
    for _, losses in by_rank:
        assert losses == pytest.approx(expected, rel=1e-5)
    one, two = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("one", "two"))
    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert FishMask.from_pretrained(tmp_path / "two") == get_mask(alone.model)
    for refused, saved, at, best in in_processes(
        2, tmp_path / "b", resumed_with_trainer, *arguments
    ):
        assert refused[0] == "ValueError" and "was trained with another mask" in refused[1]
        assert_identical([two, saved])
        assert at is not None and at.endswith("checkpoint-4")  # The losses rise.
        kept = load_file(tmp_path / "two" / "checkpoint-4" / "adapter_model.safetensors")
        named = {in_file(name): tensor for name, tensor in best.items()}
        assert_identical([kept, {name: named.pop(name) for name in kept}])
        assert not named


def trained_from_files(rank, folder, count, flow):
    """As users of a Trainer go: its arguments first, then the model from its files."""
    kind = TrainingArguments if flow is ours else import_module("trl").SFTConfig
    if count > 1:
        before_training_arguments()
        args = zero_arguments(folder / f"{count}", settings(3, **AUTO), kind)
    else:
        args = kind(str(folder / f"{count}"), use_cpu=True, **trainer_settings(4))
    model = with_lora(LlamaForCausalLM.from_pretrained(folder / "m"), lora_dropout=0.0)
    assert (count > 1) == (model.get_input_embeddings().weight.numel() == 0)
    trainer = flow(model, args)
    trainer.train()
    trainer.save_model()


FISH = FishConfig(keep_ratio=0.3, num_samples=8, names_to_exclude=())


def ours(model, args):
    examples = examples_for(model, 16, shortest=6, longest=6)
    examples = [{**example, "labels": example["input_ids"]} for example in examples]
    train_set, eval_set = examples[:12], examples[12:]
    return FishTuningTrainer(
        model=model, args=args, train_dataset=train_set, eval_dataset=eval_set, fish_config=FISH
    )


def of_trl(model, args):
    """As the documentation says: TRL's own checkpointing would be reentrant here."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    words = WORDS[3:]
    texts = [" ".join(words[i * j % len(words)] for j in range(1, 7)) for i in range(1, 17)]
    trainer = import_module("trl").SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"text": texts[:12]}),
        eval_dataset=Dataset.from_dict({"text": texts[12:]}),
        processing_class=tiny_tokenizer(),
    )
    mask_trainer(trainer, FISH, progress=False)
    return trainer


@pytest.mark.parametrize("flow", [ours, of_trl])
def test_trainer_of_a_model_that_was_divided_as_it_was_loaded(flow, tmp_path):
    """Guards the Trainers' own scoring of a base model that no process holds."""
    tiny_llama().save_pretrained(tmp_path / "m")
    in_processes(2, tmp_path / "a", trained_from_files, tmp_path, 2, flow)
    trained_from_files(0, tmp_path, 1, flow)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "12")
    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    masks = [FishMask.from_pretrained(tmp_path / n) for n in "12"]
    assert masks[0] == masks[1]
