"""The readers of files, fuzzed for a moment; `make fuzz` takes ten minutes."""

import pytest
from hypothesis import HealthCheck, given, settings

from .fuzz.__main__ import fuzz
from .fuzz.readers import FUZZERS, Fuzzer


@pytest.mark.parametrize("name", FUZZERS)
def test_readers(name):
    """Guards against any error but the reader's own, one that names no file, and nonsense read."""
    fuzzer = FUZZERS[name]
    checked = given(fuzzer.inputs())(fuzzer.check)
    settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))(checked)()


def test_a_crash_is_found(capsys):
    """Guards against a fuzzer that reports nothing whatever happens."""

    def crash(content):
        raise KeyError(content)

    tried, crashes, _ = fuzz(Fuzzer(FUZZERS["results"].inputs, crash), 0.01)
    assert tried >= 1 and crashes == 1
    assert "KeyError" in capsys.readouterr().out
