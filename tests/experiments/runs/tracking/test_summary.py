"""The summary of a tracked run."""

from fish_tuning.experiments.runs.tracking.summary import summary_of
from tests.experiments.sweep_sample import make_run


def test_summary_of_a_run():
    """Guards the counts by layer and by kind of tensor, and the metrics."""
    run = make_run("LoRA-FISH", 1, 0.5)
    summary = summary_of(run)
    assert summary["final/accuracy"] == run.metrics["accuracy"]
    assert summary["parameters/trainable"] == run.trainable_params
    tensors = run.mask_density
    assert summary["mask/all/selected"] == sum(tensor.selected for tensor in tensors)
    layer = [tensor for tensor in tensors if ".layer.3." in tensor.name]
    assert summary["mask/layer 3/selected"] == sum(tensor.selected for tensor in layer)
    kind = [tensor for tensor in tensors if "value.lora_B" in tensor.name]
    name = "mask/attention.self.value B"
    assert summary[f"{name}/selected"] == sum(tensor.selected for tensor in kind)
    assert summary[f"{name}/density"] == summary[f"{name}/selected"] / (6 * 3072)
    histogram = run.score_histograms[0]
    entries = histogram.zeros + sum(histogram.counts)
    assert summary["scores/lora_A/zeros"] == histogram.zeros / entries
    assert all(isinstance(value, int | float) for value in summary.values())
