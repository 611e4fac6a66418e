"""`fish-tuning plan`."""

from fish_tuning.cli.terminal import ConfigFile, Overrides, quiet_libraries, stdout, user_errors


def plan(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Show budgets, trainable counts and steps, without weights and without training."""
    with user_errors():
        from fish_tuning.experiments.config.load import load_config
        from fish_tuning.experiments.models.find import check_model
        from fish_tuning.experiments.runs.preflight import check_training_args

        config = load_config(config_file, overrides or [])
        quiet_libraries()
        check_training_args(config)
        check_model(config.model.name)

        from fish_tuning.experiments.plan import plan as plan_experiment

        stdout().print(plan_experiment(config))
