"""Densities of a mask by layer, module and side of LoRA."""

import torch

from fish_tuning import FishMask
from fish_tuning.experiments.report.figures.density import density_table


def test_density_table_tells_modules_of_one_name_apart():
    """Guards modules that share the end of their path from being added up."""
    layer = "encoder.layer.0"
    mask = FishMask(
        {
            f"{layer}.attention.output.dense.weight": torch.ones(2, 2).bool(),
            f"{layer}.output.dense.weight": torch.zeros(2, 2).bool(),
            "classifier.weight": torch.eye(2).bool(),
        }
    )
    table = density_table(mask)
    assert table.headers == ("layer", "attention.output.dense", "output.dense", "classifier", "all")
    assert table.rows == (
        ("0", "100.00%", "0.00%", "", "50.00%"),
        ("-", "", "", "50.00%", "50.00%"),
        ("all", "100.00%", "0.00%", "50.00%", "50.00%"),
    )
