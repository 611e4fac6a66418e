"""`fish-tuning plan`."""

from typing import Annotated

import typer

from fish_tuning.cli.terminal import ConfigFile, Overrides, quiet_libraries, stdout, user_errors
from fish_tuning.experiments.config.devices import Devices, Engine


def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Estimate each arm's memory per device too.")
    ] = False,
    devices: Annotated[int, typer.Option(min=1, help="Devices that train together.")] = 1,
    engine: Annotated[Engine, typer.Option(help="What divides a model among them.")] = "ddp",
) -> None:
    """Show budgets, trainable counts and steps, without weights and without training."""
    with user_errors():
        from fish_tuning.experiments.config.load import load_config
        from fish_tuning.experiments.runs.preflight import check_experiment

        config = load_config(config_file, overrides or [])
        quiet_libraries()
        checked = check_experiment(config, to_train=False, source=str(config_file))

        from fish_tuning.experiments.plan import plan_experiment

        of = Devices(devices, engine) if memory else None
        stdout().print(plan_experiment(checked, of))
