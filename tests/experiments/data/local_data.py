"""Write and load small local data sets."""

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.data.load import load_data

TEXTS = [f"sentence number {i} of them" for i in range(12)]


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return str(path)


def load(path=None, **options):
    return load_data(DatasetConfig(path=path if path is None else str(path), **options))


def rows(data):
    return list(zip(*(data[column][:] for column in data.column_names), strict=True))
