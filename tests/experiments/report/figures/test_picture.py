"""Pictures of masks, read back from matplotlib and from the files."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fish_tuning import FishMask
from fish_tuning.experiments.report.figures.picture import mask_figure, save_mask_picture


def heatmap(axes):
    """The values that a panel's cells show, from the top row down."""
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def test_picture_has_a_panel_for_each_side():
    """Guards against cells in the wrong row, column or panel."""
    name = "base_model.model.bert.encoder.layer.{}.{}.lora_{}.default.weight"
    bits = torch.arange(10).reshape(2, 5)
    mask = FishMask(
        {
            name.format(10, "attention.self.query", "A"): bits < 2,
            name.format(2, "attention.self.query", "A"): bits < 5,
            name.format(2, "attention.output.dense", "B"): bits < 4,
            name.format(2, "output.dense", "B"): bits < 0,
            "base_model.model.classifier.weight": torch.ones(9).bool(),
        }
    )
    figure = mask_figure(mask)
    a, b, _ = figure.axes
    assert [axes.get_title() for axes in (a, b)] == ["A", "B"]
    assert heatmap(a).tolist() == [[0.5], [0.2]]
    np.testing.assert_equal(heatmap(b), [[0.4, 0.0], [np.nan, np.nan]])
    assert [t.get_text() for t in a.get_yticklabels()] == ["2", "10"]
    assert [t.get_text() for t in b.get_xticklabels()] == [
        "attention.output.dense",
        "output.dense",
    ]
    assert figure.get_supxlabel() == "trained in full: classifier"


def test_mask_figure_counts_the_mask():
    """Guards against a picture of anything but the mask: of a model's own weights here, no
    adapter."""
    tensor = torch.zeros(4, 5, dtype=torch.bool)
    tensor[0, :3] = True
    mask = FishMask({"layers.0.fc.weight": tensor, "layers.1.fc.weight": ~tensor})
    panel = mask_figure(mask).axes[0]
    assert heatmap(panel).tolist() == [[0.15], [0.85]]


@pytest.mark.parametrize("ending", ["png", "svg", "PNG"])
def test_mask_pictures(tmp_path, ending):
    """Guards against files that are not what their ending says, that differ, or that are left
    half."""
    mask = FishMask({"layers.0.lora_A.weight": torch.eye(3).bool()})
    paths = [tmp_path / "new" / f"{name}.{ending}" for name in "ab"]
    for path in paths:
        save_mask_picture(mask, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(paths[0].parent.iterdir()) == paths
    if ending == "svg":
        assert ElementTree.parse(paths[0]).getroot().tag.endswith("svg")
    else:
        assert imread(paths[0], format="png").shape[2] == 4


def test_pictures_do_not_depend_on_the_users_settings(tmp_path):
    """Guards against bytes that change with a matplotlibrc, and settings that leak out."""
    import matplotlib

    mask = FishMask({"layers.0.lora_A.weight": torch.eye(3).bool()})
    save_mask_picture(mask, tmp_path / "a.svg")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        save_mask_picture(mask, tmp_path / "b.svg")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_mask_pictures_of_other_endings_are_refused(tmp_path):
    """Guards against a PDF called .jpg, and an error that does not name the remedy."""
    mask = FishMask({"x": torch.ones(2).bool()})
    with pytest.raises(ValueError, match=r"a \.png or \.svg file, and '.*x\.jpg' is neither"):
        save_mask_picture(mask, tmp_path / "x.jpg")
    assert not list(tmp_path.iterdir())
