"""The lock on an output folder."""

import pytest

from fish_tuning.experiments.config.lock import LOCK_FILE, check_unlocked, locked
from fish_tuning.experiments.errors import ConfigError


def test_a_locked_folder(tmp_path):
    """Guards against two sweeps in one folder, and a check that leaves something behind."""
    check_unlocked(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with locked(tmp_path):
        for enter in (lambda: check_unlocked(tmp_path), locked(tmp_path).__enter__):
            with pytest.raises(ConfigError, match="another process is running an experiment in"):
                enter()
    check_unlocked(tmp_path)
    assert (tmp_path / LOCK_FILE).is_file()
