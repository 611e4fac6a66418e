"""`fish-tuning plan`."""

from fish_tuning.cli.terminal import ConfigFile, Overrides, quiet_libraries, stdout, user_errors


def plan(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Show budgets, trainable counts and steps, without weights and without training."""
    with user_errors():
        from fish_tuning.experiments.config.load import load_config
        from fish_tuning.experiments.runs.preflight import check_experiment

        config = load_config(config_file, overrides or [])
        quiet_libraries()
        checked = check_experiment(config, to_train=False, source=str(config_file))

        from fish_tuning.experiments.plan import plan_experiment

        stdout().print(plan_experiment(checked))
