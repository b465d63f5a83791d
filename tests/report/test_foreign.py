"""Run folders that somebody else wrote: one line or a page, and nothing in it that acts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlean.report.borders import borders
from fedlean.report.console import cost_table
from fedlean.report.notices import notices_section
from fedlean.report.outcome import comparison_outcome, run_outcome
from fedlean.report.page import comparison_page, run_page
from fedlean.report.run_folder import read_run, targets_of
from fedlean.report.stage_table import stages_section
from fedlean.report.stages import stages_notes
from fedlean.report.tables import costs, differences, summary_rows

ODD = [None, True, -1, 2.5, 1e308, float("nan"), 10**400, "", "x", [], [[]], {}, {"a": 1}, [None]]
BOMBS = [b"[" * 10**6, b'{"a":' * 10**6, b"\xff\xfe", b"9" * 10**5, b"\0" * 9, b"[" * 900]
SCRIPT = '<script>alert(1)</script>"><img src=x onerror=y>&\x1b[31m'


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value within, of lists to the first."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    if isinstance(value, list) and value:
        yield from places(value[0], (*at, 0))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(copy[at[0]], at[1:], new)
    return copy


@pytest.mark.parametrize("name", ["config.json", "rounds.jsonl", "summary.json"])
def test_any_value_by_any_other(tmp_path: Path, synthetic, name: str):
    """Each is read, or refused in one line that names the file."""
    folder = synthetic.make_run(
        tmp_path / "a",
        {1: 0.5, 2: 0.95},
        rounds=2,
        initial=1,
        change=synthetic.staged((1, 2), "ab"),
    )
    path, beside = folder / name, read_run(folder)
    lines = path.read_text().splitlines()
    whole = json.loads(lines[-1])
    refused = 0
    with Path("/dev/null").open("w") as nowhere:
        for at in places(whole):
            for odd in ODD:
                changed = json.dumps(replaced(whole, at, odd))
                path.write_text("".join(f"{line}\n" for line in [*lines[:-1], changed]))
                try:
                    run = read_run(folder)
                    targets = targets_of([beside, run])
                except ValueError as error:
                    refused += 1
                    assert str(folder) in str(error) and "\n" not in str(error)
                    assert len(str(error)) < 600
                    continue
                runs = [beside, run]
                run_outcome(run, targets), comparison_outcome(runs, targets)
                costs(runs, targets), differences(runs), summary_rows(runs), notices_section(run)
                stages_section(run), stages_notes(["beside", "run"], runs), borders([run])
                Console(file=nowhere).print(cost_table(runs))
    assert refused >= len(ODD) - 2  # at least the whole by anything but an object


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
@pytest.mark.parametrize("name", ["config.json", "rounds.jsonl", "summary.json"])
def test_what_is_no_json(tmp_path: Path, synthetic, name: str, bomb: bytes):
    folder = synthetic.make_run(tmp_path / "a", {1: 0.5}, rounds=1)
    (folder / name).write_bytes(bomb + b"\n")
    with pytest.raises(ValueError, match=rf"{name}: (line 1 is )?not JSON") as error:
        read_run(folder)
    assert "\n" not in str(error.value)


EXTREMES = [
    {"round": 1 << 50},
    {"loss": 1e100},
    {"loss": -1e100},
    {"layer_density": {"a": None, "b": "x", "c": float("nan"), "d": 1e300}},
    {"layer_density": {SCRIPT + str(i): 0.5 for i in range(9)}},
    {"compute_seconds": 1e100, "link_seconds": -3},
    {"peak_memory_bytes": 1e100},
    {"stage": SCRIPT, "method": {SCRIPT: 1e100, "frozen": 1}, "devices": 1e100, "able_devices": 1},
    {"stage": "a", "round": 1 << 50, "method": {"": -1e100}, "able_devices": 0, "devices": 3},
]


@pytest.mark.parametrize("change", EXTREMES, ids=range(len(EXTREMES)))
def test_extremes_are_drawn(tmp_path: Path, synthetic, change: dict[str, Any]):
    run = read_run(
        last_row(synthetic.make_run(tmp_path / "a", {1: 0.5, 2: 0.95}, rounds=2), change)
    )
    assert "</html>" in run_page(run) and "</html>" in comparison_page([run, run])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracy": -0.1}, "'accuracy' is -0.1, expected a share"),
        ({"accuracy": 1e100}, "'accuracy' is 1e+100"),
        ({"density": 2}, "'density' is 2.0"),
        ({"layer_density": {"fc.weight": -1}}, "'fc.weight' is -1.0"),
        ({"round": -1}, "'round' is -1, expected a count"),
        ({"round": True}, "is not a step of a run"),
        ({"rejected": ["a"]}, "expected client ids"),
        ({"refused": [1]}, "'refused' is [1], expected a dict"),
    ],
)
def test_what_no_run_has_is_refused(tmp_path: Path, synthetic, change: dict[str, Any], said: str):
    folder = last_row(synthetic.make_run(tmp_path / "a", {1: 0.5, 2: 0.95}, rounds=2), change)
    with pytest.raises(ValueError, match=re.escape("rounds.jsonl: line 2")) as error:
        read_run(folder)
    assert said in str(error.value)


def last_row(folder: Path, change: dict[str, Any]) -> Path:
    path = folder / "rounds.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | change)]) + "\n")
    return folder


class Tags(HTMLParser):
    """Every tag of a page, and every attribute that acts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(name for name, _ in attrs if name.startswith("on"))}


def test_no_text_of_a_folder_becomes_a_tag(tmp_path: Path, synthetic):
    folder = synthetic.make_run(tmp_path / f"a{SCRIPT}".replace("/", "∕"), {1: 0.95}, rounds=1)
    row = json.loads((folder / "rounds.jsonl").read_text())
    row |= {"phase": SCRIPT, "notes": [SCRIPT], "refused": {"0": SCRIPT}, "rejected": [0]}
    row["layer_density"] = {SCRIPT: 0.5}
    (folder / "rounds.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("config.json", "summary.json"):
        document = json.loads((folder / name).read_text())
        document |= {key: SCRIPT for key, value in document.items() if isinstance(value, str)}
        document |= {SCRIPT: SCRIPT, "notes": [SCRIPT]}
        document["data"] = {"changes": [{"after_round": SCRIPT, "changed": [SCRIPT]}]}
        (folder / name).write_text(json.dumps(document))
    run = read_run(folder)
    for html in (run_page(run), comparison_page([run, run])):
        tags = Tags()
        tags.feed(html)
        assert not {"script", "onerror", "iframe", "img"} & tags.found
        assert "alert(1)" in html


def test_the_table_of_the_terminal_moves_no_cursor(tmp_path: Path, synthetic, capsys):
    folder = synthetic.make_run(tmp_path / "a\x1b[2J\x1b]0;t\x07[bold]", {1: 0.95}, rounds=1)
    Console(width=200).print(cost_table([read_run(folder)]))
    said = capsys.readouterr().out
    assert "\x1b" not in said and "a\\x1b[2J\\x1b]0;t\\x07[bold]" in re.sub(r"\s", "", said)


@pytest.mark.parametrize("target", [float("nan"), float("inf"), 0.0, 1.0, -1e-3])
def test_a_target_that_is_no_accuracy(tmp_path: Path, synthetic, target: float):
    run = read_run(synthetic.make_run(tmp_path / "a", {1: 0.95}, rounds=1))
    with pytest.raises(ValueError, match=r"target accuracy must lie in \(0, 1\)"):
        comparison_page([run], [target])
