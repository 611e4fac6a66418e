"""Interactive maps of masks, read back from their traces."""

from fish_tuning.experiments.report.figures.mask_map import highest_density, mask_map
from fish_tuning.experiments.results import TensorDensity

NAME = "base_model.model.bert.encoder.layer.{}.{}.lora_{}.default.weight"
TENSORS = [
    TensorDensity(name=NAME.format(10, "attention.self.query", "A"), selected=1, entries=10),
    TensorDensity(name=NAME.format(10, "attention.self.query", "A"), selected=2, entries=10),
    TensorDensity(name=NAME.format(2, "attention.self.query", "A"), selected=5, entries=10),
    TensorDensity(name=NAME.format(2, "attention.output.dense", "B"), selected=4, entries=10),
    TensorDensity(name=NAME.format(2, "output.dense", "B"), selected=0, entries=10),
    TensorDensity(name="base_model.model.classifier.weight", selected=9, entries=9),
]


def test_density_by_layer_and_module():
    """Guards against cells in the wrong row, column or panel, and seeds that overwrite each
    other."""
    figure = mask_map(TENSORS, 0.5)
    a, b = figure.data
    assert [list(row) for row in a.z] == [[0.5], [0.15]]
    assert [list(row) for row in b.z] == [[0.4, 0.0], [None, None]]
    layout = figure.layout
    assert [layout.xaxis.title.text, layout.xaxis2.title.text] == ["A", "B"]
    assert list(layout.yaxis.ticktext) == ["2", "10"]
    assert list(layout.xaxis2.ticktext) == ["attention.out...", "output.dense"]
    assert [cell[1] for cell in b.customdata[0]] == ["attention.output.dense", "output.dense"]


def test_all_masks_share_one_color_scale():
    """Guards against colors that mean one density in one map and another in the next."""
    sparse = [TensorDensity(name="layers.0.fc.weight", selected=1, entries=100)]
    highest = highest_density([TENSORS, sparse])
    assert highest == 0.5  # not the head, which no map shows
    for tensors in (TENSORS, sparse):
        axis = mask_map(tensors, highest).layout.coloraxis
        assert (axis.cmin, axis.cmax) == (0, 0.5)


def test_no_map_without_a_mask():
    """Guards against empty frames in the report."""
    assert mask_map([], 1.0) is None
    assert highest_density([]) == 1.0
