"""Files in a folder or on the hub, with and without a network."""

import pytest
from huggingface_hub.errors import HFValidationError

from fish_tuning.hub import ask_hub, find_file

WORDS = {"contents": "scores", "writer": "save"}


@pytest.mark.parametrize("cached", [True, False])
def test_without_a_network(monkeypatch, tmp_path, cached):
    """Guards against half a minute of retries, and an earlier download that is not used."""

    def ask(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    def download(repo_id, filename, *, local_files_only, **kwargs):
        assert local_files_only
        if not cached:
            raise FileNotFoundError("not in the cache")
        return str(tmp_path / filename)

    monkeypatch.setattr("fish_tuning.hub.ask_hub", ask)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    if cached:
        assert find_file("someone/fish", "x.json", **WORDS) == tmp_path / "x.json"
        return
    with pytest.raises(
        FileNotFoundError, match=r"someone/fish is not a local.*\(no route\)\. Name"
    ):
        find_file("someone/fish", "x.json", **WORDS)


def test_a_path_that_is_no_repository(monkeypatch):
    """Guards a mistyped path against any request."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    with pytest.raises(FileNotFoundError, match="out/run/adaptr is not a local folder"):
        find_file("out/run/adaptr", "x.json", **WORDS)
    with pytest.raises(HFValidationError):
        ask_hub("out/run/adaptr")


def test_not_a_path():
    """Guards the files of a model that was handed over itself."""
    with pytest.raises(TypeError, match="a dict is not a folder: name the one that save wrote"):
        find_file({}, "x.json", **WORDS)
