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
    "loss", "density", "layers", "memory", "split",
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


def check(page, more=()):
    """Parse a page and assert what holds for every page; it has the figures PLOTS and `more`."""
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert "#fe0" not in page and "nan" not in re.findall(r' d="[^"]*"', page)
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and len(set(checker.ids)) == len(checker.ids)
    assert set(checker.references) <= set(checker.ids)
    assert sorted(checker.figures) == sorted(PLOTS.union(more))
    assert len(checker.svgs) == len(checker.figures)
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


STAGED = {"participation", "method-0", "method-1"}


def figure(page, key):
    return page[page.index(f'<figure id="{key}">') :].partition("</figure>")[0]


def test_a_run_in_stages(tmp_path, synthetic):
    """stem until round 10, body 20, head 40: 10, 20 and 30 MB."""
    change = synthetic.staged((10, 20, 40), ("stem", "body", "head"))
    folder = synthetic.make_run(tmp_path / "a", {40: 0.9}, rounds=40, change=change)
    run = read_run(folder)
    page = run_page(run)
    check(page, STAGED)
    for key in ("accuracy-rounds", "loss", "density", "layers", "memory", *STAGED):
        drawn = figure(page, key)
        assert [f">{name}</text>" in drawn for name in ("stem", "body", "head")] == [True] * 3, key
    assert ">stem</text>" not in figure(page, "accuracy-time")
    assert ">mean</text>" in figure(page, "memory")
    # movement and floor are within ten of each other, slope is not
    first, second = (re.findall(r"</svg>(\w+)</li>", figure(page, f"method-{i}")) for i in (0, 1))
    assert (first, second) == (["movement", "floor"], ["slope"])
    assert "★" in figure(page, "method-0")
    assert "Dotted lines are where the next stage of training begins." in page
    # 10 rounds of 10 MB, 10 of 20, 20 of 30: 22.5 in the mean, and their median between 20 and 30
    assert (
        "It trained 3 stages; the neediest client&#x27;s modelled peak was 30.0 MB at most and "
        "22.5 MB in the mean over rounds." in page
    )
    assert page.index("<h2>Curves") < page.index("<h2>Stages") < page.index("<h2>The run")
    compared = comparison_page([run, run])
    check(compared, {"participation"})
    assert ">stem</text>" not in compared and "Ticks above a plot are" in compared
    assert compared.count("<summary>Stages of a (") == 2


def test_a_stage_after_the_last_evaluation_is_not_drawn_beside_the_plot(tmp_path, synthetic):
    change = synthetic.staged((10, 60), ("stem", "head"))
    folder = synthetic.make_run(tmp_path / "a", {5: 0.2, 20: 0.9}, rounds=60, change=change)
    page = run_page(read_run(folder))
    for key, drawn in (("accuracy-rounds", False), ("loss", False), ("memory", True)):
        assert (">head</text>" in figure(page, key)) == drawn
        assert ">stem</text>" in figure(page, key)


def test_stages_that_take_turns_have_no_borders(tmp_path, synthetic):
    def change(row):
        row["stage"] = f"part{row['round'] % 3}"

    run = read_run(synthetic.make_run(tmp_path / "a", {9: 0.5}, rounds=12, change=change))
    page = run_page(run)
    check(page)
    assert "In a stages take turns, 11 changes in 12 rounds: the plots show no borders." in page
    assert ">part1</text>" not in page and ">part1</th>" in page


def test_a_run_without_stages_has_its_memory_and_no_more(tmp_path, synthetic):
    def change(row):
        row |= {"stage": None, "method": {}, "devices": 10, "able_devices": 10}

    page = run_page(read_run(synthetic.make_run(tmp_path / "a", {3: 0.5}, rounds=3, change=change)))
    check(page)
    assert "<h2>Stages" not in page and "Dotted lines" not in page
    assert ">mean</text>" not in figure(page, "memory")  # it would lie on the line itself


def test_names_of_stages_and_measures_are_escaped_and_bounded(tmp_path, synthetic):
    closed = EVIL.replace("\\", "/")

    def change(row):
        row["stage"] = f"{closed} {row['round'] // 2} " + 300 * "long"
        row["phase"] = closed if row["round"] % 4 else "train"
        row["method"] = {f"{closed} {i}": (-1) ** i * 10.0**i for i in range(40)}
        row["method"] |= {"text": "x", "none": None, "huge": 1e300, "frozen": "1"}

    run = read_run(synthetic.make_run(tmp_path / "a", {30: 0.5}, rounds=30, change=change))
    page = run_page(run)
    check(page, {f"method-{i}" for i in range(3)})  # of 40 names the first six, two in each
    assert "What the method measured (first 6 of 40)" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    check(comparison_page([run, run]))


@pytest.mark.parametrize(
    "keys",
    [
        {"devices": 3, "able_devices": 4},
        {"devices": 0, "able_devices": 0},
        {"devices": -2, "able_devices": -1},
        {"devices": "3", "able_devices": [1]},
        {"devices": 3, "able_devices": None},
        {"peak_memory_bytes": -1, "method": {"slope": float("nan")}, "cohort": 3},
        {"peak_memory_bytes": 1e99, "method": {"slope": 1e99}},
    ],
)
def test_odd_values_of_the_newer_keys(tmp_path, synthetic, keys):
    def change(row):
        row |= {"stage": "a" if row["round"] < 3 else "b", **keys}

    run = read_run(synthetic.make_run(tmp_path / "a", {4: 0.5}, rounds=5, change=change))
    page = run_page(run)
    check(page, {"method-0"} if keys.get("method", {}).get("slope") == 1e99 else set())


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
