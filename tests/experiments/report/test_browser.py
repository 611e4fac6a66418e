"""The HTML report in a real browser, where one is installed."""

import re
import shutil
import subprocess

import pytest

from fish_tuning.experiments.report.write import write_report
from tests.experiments.sweep_sample import make_sweep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome"),
]


def test_every_figure_is_drawn_without_an_error(tmp_path):
    """Guards scripts that the page's own policy forbids, errors in them, and missing figures."""
    write_report(make_sweep(seeds=(1, 2), ratios=(1.0, 0.25)), tmp_path)
    page = tmp_path / "report.html"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000"]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert not re.search(r"CONSOLE.*(Error|Refused|violates)", done.stderr), done.stderr
    figures = len(re.findall(r'<div class="plot[^"]*"[^>]*data-figure', done.stdout))
    assert figures > 10
    assert len(re.findall(r'<svg class="main-svg"[^>]*>(?=<defs)', done.stdout)) >= figures
