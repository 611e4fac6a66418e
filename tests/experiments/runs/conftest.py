"""A tiny model and its data, which the runs of several tests share."""

import gc

import pytest

from tests.experiments.tiny_experiment import write_bert, write_data


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_bert(folder / "model"), write_data(folder / "data.csv")


@pytest.fixture(scope="package", autouse=True)
def _imports_are_no_garbage():
    """Every run collects garbage twice, which would look through all that torch has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
