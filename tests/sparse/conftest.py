"""Every kind of model is tried by `make test-all`, the most common ones in the quick tests too."""

from pathlib import Path

import pytest

from tests.sparse.twins import TIED, TWO

QUICK_KINDS = {"lora", "ia3", TIED, TWO}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.path).name.startswith("test_ordinary_"):
            kind = getattr(item, "callspec", None) and item.callspec.params.get("kind")
            if isinstance(kind, str) and kind not in QUICK_KINDS:
                item.add_marker(pytest.mark.slow)
