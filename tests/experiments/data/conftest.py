"""Local data that several tests load."""

import pytest

from tests.experiments.data.local_data import TEXTS, write


@pytest.fixture
def tsv(tmp_path):
    lines = ["text\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(TEXTS))]
    return write(tmp_path / "data.tsv", "\n".join(lines))
