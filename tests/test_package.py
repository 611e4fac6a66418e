"""The package's own face."""

import subprocess
import sys

import fish_tuning


def test_every_public_name_is_there():
    """Guards a name that is announced and cannot be imported."""
    assert sorted(fish_tuning._HOMES) == fish_tuning.__all__
    for name in fish_tuning.__all__:
        assert getattr(fish_tuning, name).__doc__


def test_import_takes_no_torch():
    """Guards the command line's --help against a second of imports."""
    program = "import fish_tuning, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
