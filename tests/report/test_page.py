"""The pages: self-contained, escaped, deterministic, complete, small."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from fedlean.report import comparison_page, read_run, run_page, write_page
from fedlean.report.curves import layer_grid, thin

PLOTS = {
    "accuracy-rounds", "accuracy-time", "accuracy-bytes", "accuracy-flops",
    "loss", "density", "layers", "split",
}  # fmt: skip
VOID = {"meta", "br", "path", "use", "image", "rect"}
LOADS = {"script", "link", "img", "iframe", "object", "embed", "audio", "video", "source", "base"}


class Checker(HTMLParser):
    """Balanced tags, no loads, ids and references."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.figures, self.svgs = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert tag not in LOADS, tag
        assert not any(name.startswith("on") for name in values), attrs
        self.ids += [values["id"]] if "id" in values else []
        self.figures += [values["id"]] if tag == "figure" else []
        self.svgs += [values] if tag == "svg" and values.get("role") == "img" else []
        for name in ("href", "src", "xlink:href", "style", "clip-path"):
            self.check(name, values.get(name) or "")
        if tag not in VOID:
            self.open.append(tag)

    def check(self, name, value):
        if name in ("href", "src", "xlink:href") and value:
            assert value.startswith(("#", "data:image/png;base64,")), value
            self.references += [value[1:]] if value[0] == "#" else []
        for target in re.findall(r"url\(([^)]*)\)", value):
            assert target.startswith("#")
            self.references.append(target[1:])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def check(page):
    """Parse a page and assert what holds for every page."""
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert "#fe0" not in page and "nan" not in re.findall(r' d="[^"]*"', page)
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and len(set(checker.ids)) == len(checker.ids)
    assert set(checker.references) <= set(checker.ids)
    assert set(checker.figures) == PLOTS and len(checker.figures) == len(PLOTS)
    assert len(checker.svgs) == len(PLOTS)
    assert all(svg["aria-label"] and svg["viewbox"] for svg in checker.svgs)
    return checker


@pytest.fixture
def three(tmp_path, synthetic):
    make, curve = synthetic.make_run, synthetic.curve
    return [
        read_run(make(tmp_path / "fedavg", curve(40), rounds=40)),
        read_run(
            make(tmp_path / "prunefl", curve(40), rounds=40, density=0.3, initial=3, layers=9)
        ),
        read_run(make(tmp_path / "low", {40: 0.3}, rounds=40, summary=False, device=None)),
    ]


def test_pages_are_whole_and_deterministic(three):
    for render in (lambda: run_page(three[1]), lambda: comparison_page(three)):
        page = render()
        check(page)
        assert page == render()


def test_comparison_says_what_matters(three):
    page = comparison_page(three)
    assert "low did not reach 90.0% (best 30.0% in round 40), which fedavg reached after" in page
    assert "not reached: best 30.0%, round 40" in page
    assert "device profile “raspberry-pi-4” (fedavg, prunefl)" in page
    assert "wall time and RAM on this machine show no saving" in page
    assert "full-gradient uploads" in page
    assert (
        "Before round 1, prunefl spent 30.0 s, 6.00 MB, 3.00 GFLOP per client in 3 steps." in page
    )
    assert "These runs differ in device" in page
    assert page.count("<details>") == 3
    # Explicit targets replace those of the summaries.
    assert "50.0%</th>" in comparison_page(three, [0.5]) and "50.0%</th>" not in page
    assert "No target accuracy was set" in comparison_page(three, [])


@pytest.mark.parametrize(
    "options",
    [
        {"accuracies": {1: 0.5}, "rounds": 1},
        {"accuracies": {}, "rounds": 5, "summary": False},
        {"accuracies": {0: 0.0, 3: 0.0}, "rounds": 3, "initial": 1},
        {"accuracies": {4: 1.0}, "rounds": 4, "seconds": None},
        {"accuracies": {4: 0.2, 300: 0.96}, "rounds": 300, "layers": 80},
        {"accuracies": {2: 0.2}, "rounds": 2, "layers": 0, "targets": ()},
        {"accuracies": {2: 0.96}, "rounds": 2, "targets": tuple(i / 20 for i in range(1, 20))},
    ],
)
def test_unusual_runs(tmp_path, synthetic, options):
    run = read_run(synthetic.make_run(tmp_path / "run", options.pop("accuracies"), **options))
    check(run_page(run))
    check(comparison_page([run, run]))


def test_a_run_without_a_step(tmp_path, synthetic):
    folder = synthetic.make_run(tmp_path / "run", {1: 0.5}, rounds=1, summary=False)
    (folder / "rounds.jsonl").write_text("")
    run = read_run(folder)
    assert "run has not finished a step yet." in run_page(run)
    check(comparison_page([run, run]))


EVIL = "<script>alert(1)<\\script>&\"'$x_1$ \N{CJK UNIFIED IDEOGRAPH-4E2D}"


def test_everything_from_files_is_escaped(tmp_path, synthetic):
    # No slash in a folder's name; elsewhere the closing tag is written out.
    closed = EVIL.replace("\\", "/")
    facts = dict.fromkeys(("method", "dataset", "model", "device", "arithmetic", "engine"), closed)
    folder = synthetic.make_run(tmp_path / EVIL, {2: 0.96}, rounds=3, density=0.5, **facts)
    log = (folder / "rounds.jsonl").read_text().replace("conv0.weight", json.dumps(closed)[1:-1])
    (folder / "rounds.jsonl").write_text(log)
    run = read_run(folder)
    for page in (run_page(run), comparison_page([run, run])):
        check(page)
        assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_long_runs_stay_small(tmp_path, synthetic):
    runs = []
    for i in range(4):
        accuracies = synthetic.curve(2000, tau=300)
        folder = synthetic.make_run(tmp_path / f"r{i}", accuracies, rounds=2000, layers=8)
        runs.append(read_run(folder))
    page = comparison_page(runs)
    check(page)
    assert len(page.encode()) < 2_000_000
    assert len(run_page(runs[0]).encode()) < 1_000_000


def test_many_runs_have_distinct_swatches(tmp_path, synthetic):
    runs = [
        read_run(synthetic.make_run(tmp_path / f"r{i}", {2: 0.9}, rounds=2, seconds=i + 1.0))
        for i in range(9)
    ]
    page = comparison_page(runs)
    check(page)
    legend = re.search(r'<ul class="legend">.*?</ul>', page)
    assert legend is not None
    swatches = re.findall(r"<svg.*?</svg>", legend[0])
    assert len(swatches) == len(set(swatches)) == 9


def test_thinning_keeps_ends_and_extremes():
    x = np.arange(5000.0)
    y = np.sin(x / 100)
    y[1234], y[4321] = 5.0, -5.0
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= 402 and thin_x[0] == 0 and thin_x[-1] == 4999
    assert thin_y.max() == 5.0 and thin_y.min() == -5.0 and (np.diff(thin_x) > 0).all()


def test_layer_grid_takes_the_last_state_of_a_round(tmp_path, synthetic):
    run = read_run(synthetic.make_run(tmp_path / "a", {}, rounds=10, initial=3, density=0.25))
    grid, last = layer_grid(run, ["conv0.weight"])
    # density ** (round / 10): 1, 0.87, ..., 0.25 for rounds 0 to 10
    assert last == 10 and grid.shape == (1, 11)
    np.testing.assert_allclose(grid[0, [0, 5, 10]], [1.0, 0.5, 0.25])


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "report.html"
    write_page(path, "one é \ud800")
    assert path.read_bytes() == "one é ?".encode()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(path, "two")
    assert path.read_bytes() == "one é ?".encode()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_link_beside_the_page_is_not_followed(tmp_path):
    """In a folder that others may write, one of them may know this process's number."""
    victim, link = tmp_path / "victim", tmp_path / f".report.html.{os.getpid()}.tmp"
    victim.write_text("precious")
    link.symlink_to(victim)
    write_page(tmp_path / "report.html", "page")
    assert victim.read_text() == "precious" and link.is_symlink()
    assert not (tmp_path / "report.html").is_symlink()


def test_a_comparison_of_nothing():
    with pytest.raises(ValueError, match="at least one run"):
        comparison_page([])


def test_without_matplotlib(tmp_path, synthetic):
    folder = synthetic.make_run(tmp_path / "a", {1: 0.5}, rounds=1)
    code = (
        "import sys; from pathlib import Path; import fedlean.report as report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try: report.run_page(report.read_run(Path(sys.argv[1])))\n"
        "except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "a report needs matplotlib: pip install 'fedlean[sim]'\n"


def test_drawing_leaves_no_global_state(three):
    import matplotlib

    before = dict(matplotlib.rcParams)
    pyplot = "matplotlib.pyplot" in sys.modules
    run_page(three[0])
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
