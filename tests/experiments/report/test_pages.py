"""The pages of a report: what they contain, and that text from files stays text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fish_tuning.experiments import report
from fish_tuning.experiments.report.comparison import compare, pool
from fish_tuning.experiments.report.pages import html_report, markdown_report
from fish_tuning.experiments.report.summary_table import pooled_table
from fish_tuning.experiments.report.write import write_report
from fish_tuning.experiments.results import Results
from tests.experiments.sweep_sample import failed_run, make_run, make_sweep
from tests.experiments.tiny_experiment import experiment

TEMPLATES = Path(report.__file__).parent / "templates"
EVIL = "<script>alert('x')</script>|`$1$`\"onload=\"[a](http://b) \u2028&amp;"


def tiny(folder, **changes):
    return experiment(folder / "model", folder / "data.csv", folder / "out", **changes)


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether the tags match."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.scripts = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data


def evil_sweep():
    run = make_run(
        EVIL,
        1,
        run_id=EVIL,
        adapter=EVIL,
        commit=EVIL,
        hardware={EVIL: EVIL},
        versions={EVIL: EVIL},
        peak_memory_of=EVIL,
        main_metric=EVIL,
        metrics={EVIL: 0.5},
        curve=[{"step": 1, EVIL: 0.5}],
    )
    config = {"model": {"name": EVIL}, "dataset": {"path": {EVIL: EVIL}}, EVIL: [EVIL]}
    return Results(name=EVIL, config=config, runs=[run, failed_run(EVIL, error=EVIL)])


def test_html_escapes_what_comes_from_files(tmp_path):
    """Guards against script, markup and attributes from names, errors, paths, metrics and
    configs."""
    write_report([evil_sweep(), make_sweep(seeds=(1,))], tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    figures, _, own = page.scripts
    assert page.tags.count("script") == 3
    assert "<" not in figures and len(json.loads(figures)) > 10
    assert own == (TEMPLATES / "report.js").read_text(encoding="utf-8")
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name.endswith("href")]
    assert links and all(link.startswith("#") for link in links)
    assert page.text.count("<script>alert('x')</script>") > 10


def test_markdown_escapes_what_comes_from_files(tmp_path):
    """Guards against markup, links and table cells from names and errors."""
    write_report(evil_sweep(), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "[a](" not in text.replace("\\[", "").replace("\\]", "")
    table = [line for line in text.split("\n") if line.startswith("|")]
    assert len(table) == 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}


def test_html_needs_nothing_else(tmp_path):
    """Guards against a page that loads a font, a picture, a style sheet or a script."""
    write_report(make_sweep(ratios=(1.0, 0.25)), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    library = page.scripts[1]
    html = (tmp_path / "report.html").read_text(encoding="utf-8").replace(library, "")
    assert not re.search(r"https?:", html)
    assert not re.search(r"\bsrc\s*=|url\((?!#)|@import|<link|<image|<iframe", html)
    assert page.attributes.count(("class", "plot")) >= 12
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_browser_runs_only_the_two_scripts():
    """Guards against a policy that would let a script from a results file run."""
    page = Page(html_report([make_sweep(seeds=(1,))]))
    policy = next(value for _, value in page.attributes if value and "script-src" in value)
    assert policy.startswith("default-src 'none';") and "eval" not in policy
    hashes = [
        "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in page.scripts[1:]
    ]
    assert re.findall(r"'(sha256-[^']*)'", policy) == hashes
    assert "unsafe" not in policy.partition("script-src")[2]


def test_incomplete_sweeps_have_a_banner(tmp_path):
    """Guards against tables of some runs that look like those of all."""
    config = tiny(tmp_path, seeds=[1, 2]).model_dump(mode="json")
    sweep = make_sweep(seeds=(1, 2), config=config)
    assert "Incomplete: of" not in html_report([sweep]) + markdown_report([sweep])
    runs = [*sweep.runs[:6], failed_run("LoRA-FISH-rand", 2, ratio=1.0)]
    for text in (
        html_report([sweep.model_copy(update={"runs": runs})]),
        markdown_report([sweep.model_copy(update={"runs": runs})]),
    ):
        assert "Incomplete: of 8 runs, 1 failed and 1 has not run yet." in text
        assert "training diverged" in text and "LoRA-FISH-rev 1, seed 2" in text


def test_several_sweeps_have_a_section_each(tmp_path):
    """Guards against sweeps of one name that end up as one, and links that lead nowhere."""
    paths = write_report([make_sweep(name="twin"), make_sweep(name="twin", seeds=(1,))], tmp_path)
    page = Page(paths[2].read_text(encoding="utf-8"))
    targets = [value for name, value in page.attributes if name == "href" and "sweep" in value]
    assert targets == ["#sweep-1", "#sweep-2"]
    assert {("id", "sweep-1"), ("id", "sweep-2")} <= set(page.attributes)
    assert paths[1].read_text(encoding="utf-8").count("## twin\n") == 2


def test_overview_shows_the_metric_beside_other_columns(tmp_path):
    """Guards the overview's cells: the metric, also where a search adds a column before it."""
    runs = [
        make_run("LoRA-FISH", seed, metrics={"accuracy": 0.625}, learning_rate=0.0075)
        for seed in (1, 2)
    ]
    sweep = Results(name="searched", config={}, runs=runs)
    page = html_report([sweep, sweep])
    overview = page[: page.index('id="sweep-1"')]
    assert ">0.6250 ±\u00a00.0000</td>" in overview and "0.0075" not in overview


def test_arms_over_several_sweeps():
    """Guards the pooled table: arms that all sweeps have, by the mean of their means."""
    arms = ("Original LoRA", "LoRA-FISH")
    one = make_sweep((1, 2), arms=arms)
    runs = [
        make_run(arm, seed, metrics={"accuracy": 0.5 + 0.1 * ("FISH" in arm)})
        for arm in (*arms, "LoRA-FISH-rand")
        for seed in (1, 2)
    ]
    other = Results(name="other", config=one.config, runs=runs)
    table = pooled_table(pool([compare(one), compare(other)]))
    headers, rows = table.headers, table.rows
    assert [row[0] for row in rows] == list(arms) and rows[0][2] == "baseline"
    means = [sum(run.metrics["accuracy"] for run in one.runs if run.arm == arm) / 2 for arm in arms]
    assert float(rows[0][1]) == pytest.approx((means[0] + 0.5) / 2, abs=1e-4)
    assert float(rows[1][2].split()[0]) == pytest.approx((means[1] - means[0] + 0.1) / 2, abs=1e-4)
    assert pool([compare(one)]) == []
    for text in (markdown_report([one, other]), html_report([one, other])):
        assert "Over all experiments" in text and headers[1] in text
    assert "Over all experiments" not in markdown_report([one])


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [failed_run()],
        [failed_run("Original LoRA"), make_run("LoRA-FISH", 1, 1.0)],
        [make_run("LoRA-FISH", 1, 1.0, main_metric=None, metrics={})],
        [make_run("IA3", 1, peak_memory_bytes=None, train_seconds=None, adapter=None)],
    ],
    ids=["no run", "only failed", "no baseline", "no metric", "missing fields"],
)
def test_reports_of_little(tmp_path, runs):
    """Guards against a report that crashes on what is not there, and one that shows None or nan."""
    paths = write_report(Results(name="little", config={}, runs=runs), tmp_path)
    library = Page(paths[2].read_text(encoding="utf-8")).scripts[1]
    for path in paths:
        text = path.read_text(encoding="utf-8").replace(library, "")
        assert not re.search(r"\bNone\b|\bnan\b", text)
