"""The preflight: everything is checked, read and counted once, and all problems are reported."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from typer.testing import CliRunner

from fish_tuning.cli import main
from fish_tuning.experiments.config import yaml_file
from fish_tuning.experiments.data.installed import text as installed_text
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models import adapters, counts
from fish_tuning.experiments.results import read_results
from fish_tuning.experiments.runs.preflight import check_experiment
from tests.experiments.tiny_experiment import experiment, write_bert, write_data

OPENED: Counter[str] = Counter()


def count_opened(event, args):
    if event == "open" and isinstance(args[0], str):
        OPENED[args[0]] += 1


# It stays for the rest of the process: Python has no way to remove an audit hook.
sys.addaudithook(count_opened)


def counted(calls, function):
    """The function, with its calls counted by name."""

    def wrapper(*args, **kwargs):
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return wrapper


def sentences(*args, **kwargs):
    """A replacement for the documentation of installed packages."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["torch", "scipy"])})
    rows = {"text": [f"w{i} w{i + 1}" for i in range(30)], "label": [i % 2 for i in range(30)]}
    split = Dataset.from_dict(rows, features=features)
    return DatasetDict(train=split, validation=split.select(range(8)))


def write_config(folder, **changes):
    """A YAML file of the shape of the quickstart's, over a base file."""
    config = experiment(write_bert(folder / "model"), folder / "train.csv", folder / "out")
    content = config.model_dump(mode="json", exclude_unset=True) | changes
    (folder / "base_config.yaml").write_text("lora: {dropout: 0.0}", encoding="utf-8")
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.mark.parametrize("source", ["files", "installed"])
def test_a_run_reads_and_counts_once(source, tmp_path, monkeypatch):
    """Guards the start of a run against a second parsing, reading or counting."""
    data = [write_data(tmp_path / f"{name}.csv") for name in ("train", "dev")]
    dataset = {"path": {"train": str(data[0]), "dev": str(data[1])}}
    if source == "installed":
        dataset = {"name": "installed_text", "num_labels": 2}
    file = write_config(tmp_path, dataset=dataset)
    calls: Counter[str] = Counter()
    for module, function in (
        (yaml_file, yaml_file.parse_yaml),
        (installed_text, sentences),
        (counts, adapters.adapted_without_weights),
    ):
        name = "load_installed_text" if function is sentences else function.__name__
        monkeypatch.setattr(module, name, counted(calls, function))
    OPENED.clear()
    result = CliRunner().invoke(main, ["run", str(file)])
    assert result.exit_code == 0, result.output
    assert [run.status for run in read_results(tmp_path / "out").runs] == ["finished"] * 4
    read = [file, tmp_path / "base_config.yaml", *(data if source == "files" else [])]
    assert {path.name: OPENED[str(path)] for path in read} == {path.name: 1 for path in read}
    assert calls == {
        "parse_yaml": 2,  # the experiment and its base
        "adapted_without_weights": 2,  # LoRA, and the adapter that the three masked arms share
        **({"sentences": 1} if source == "installed" else {}),
    }


def test_all_problems_are_told(tmp_path):
    """Guards users against fixing one mistake at a time."""
    (tmp_path / "file").touch()
    config = experiment(
        tmp_path / "nowhere" / "at" / "all",
        write_data(tmp_path / "data.csv"),
        tmp_path / "file" / "out",
        training={"args_override": {"eval_strategy": "evry"}},
    )
    with pytest.raises(ConfigError) as raised:
        check_experiment(config)
    keys = [problem.partition(":")[0] for problem in raised.value.problems]
    assert keys == ["training.output_dir", "training.args_override.eval_strategy", "model.name"]
    with pytest.raises(ConfigError) as raised:
        check_experiment(config, to_train=False)
    assert len(raised.value.problems) == 2


@pytest.mark.parametrize("to_train", [True, False])
def test_a_search_that_holds_out_all_examples(tmp_path, to_train):
    """Guards small files against a plan that looks well and a run that fails after it."""
    config = experiment(
        write_bert(tmp_path / "model"),
        write_data(tmp_path / "data.csv"),
        tmp_path / "out",
        learning_rate_search={"values": [1e-3, 2e-3]},
    )
    with pytest.raises(ConfigError, match=r"held_out: 1,000 of 108 .*hold out fewer, such as 21"):
        check_experiment(config, to_train=to_train)


def test_local_data_is_handed_on(tmp_path):
    """Guards the examples that were read, and a plan against data it can do without."""
    config = experiment(write_bert(tmp_path / "model"), write_data(tmp_path / "data.csv"), tmp_path)
    checked = check_experiment(config)
    assert checked.data is not None and len(checked.data.train) == 108
    dataset = {"path": str(tmp_path / "gone.csv"), "num_labels": 2}
    config = experiment(tmp_path / "model", Path("unused"), tmp_path, dataset=dataset)
    with pytest.raises(ConfigError, match=r"there is no file '.*gone\.csv'"):
        check_experiment(config)
    planned = check_experiment(config, to_train=False)
    assert planned.data is None and "gone.csv" in planned.data_problem


def test_a_plan_does_not_do_without_unreadable_data(tmp_path):
    """Guards a plan of what `run` then refuses, and advice that only hides the problem."""
    (tmp_path / "data.csv").write_text("text,label\na b,1\na,b,c,d\n", encoding="utf-8")
    model = write_bert(tmp_path / "model")
    for dataset in ({}, {"num_labels": 2}):
        dataset = {"path": str(tmp_path / "data.csv"), **dataset}
        config = experiment(model, Path("unused"), tmp_path, dataset=dataset)
        with pytest.raises(ConfigError, match="line 3: 4 fields where 2") as raised:
            check_experiment(config, to_train=False)
        assert len(raised.value.problems) == 1
    config = experiment(model, tmp_path / "gone.csv", tmp_path)
    with pytest.raises(ConfigError, match=r"^dataset\.path: there is no file '.*gone\.csv'"):
        check_experiment(config, to_train=False)


def test_problems_name_the_config_file(tmp_path):
    """Guards several problems against a heading that names no file."""
    config = experiment(
        tmp_path / "no",
        tmp_path / "x.csv",
        tmp_path,
        training={"args_override": {"eval_strategy": "evry"}},
    )
    with pytest.raises(ConfigError, match=r"^mine\.yaml: 2 problems"):
        check_experiment(config, source="mine.yaml")


def test_the_preflight_needs_no_torch(tmp_path):
    """Guards against slow imports before a mistake is reported."""
    file = write_config(tmp_path)
    write_data(tmp_path / "train.csv")
    program = f"""
import sys
from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.runs.preflight import check_experiment
assert check_experiment(load_config({str(file)!r})).data is not None
sys.exit(bool({{"torch", "transformers", "peft"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
