"""`fish-tuning plan`."""

from typing import Annotated

import typer

from fish_tuning.cli.terminal import ConfigFile, Overrides, quiet_libraries, stdout, user_errors
from fish_tuning.experiments.config.devices import MOST, Devices, Engine, Kind
from fish_tuning.experiments.errors import ConfigError


def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Estimate each arm's memory per device too.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Devices that train together; by default one."),
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="What divides a model among them; by default ddp.")
    ] = None,
    on: Annotated[
        Kind | None,
        typer.Option(help="What they are; by default what this machine has, and several are gpu."),
    ] = None,
) -> None:
    """Show budgets, trainable counts and steps, without weights and without training."""
    with user_errors():
        given = {"--devices": devices, "--engine": engine, "--on": on}
        for option, value in given.items():
            if value is not None and not memory:
                raise ConfigError(f"{option}: {value} is for estimates of memory; add --memory")

        from fish_tuning.experiments.config.load import load_config
        from fish_tuning.experiments.runs.preflight import check_experiment

        config = load_config(config_file, overrides or [])
        quiet_libraries()
        checked = check_experiment(config, to_train=False, source=str(config_file))

        from fish_tuning.experiments.plan import plan_experiment

        of = _devices(devices or 1, engine or "ddp", on) if memory else None
        stdout().print(plan_experiment(checked, of))


def _devices(count: int, engine: Engine, kind: Kind | None) -> Devices:
    import torch

    here: Kind = "gpu" if count > 1 or torch.accelerator.is_available() else "cpu"
    return Devices(count, engine, kind or here)
