"""Reading run folders: whole, running, cut, broken."""

import pytest

from fedlean.report import read_run
from fedlean.report.run_folder import first_reaching, targets_of, total


def test_reads_a_finished_run(tmp_path, synthetic):
    run = read_run(synthetic.make_run(tmp_path / "a", {0: 0.1, 2: 0.91}, rounds=3, initial=2))
    assert (run.name, len(run.rounds), run.num_rounds) == ("a", 5, 3)
    assert run.summary is not None and run.fact("method") == "fedavg"
    row = first_reaching(run, 0.9)
    # Two initial steps and two rounds, 1 MB down and 1 MB up each.
    assert row is not None and row["round"] == 2 and total(row, "bytes") == 4 * 2e6
    assert first_reaching(run, 0.95) is None


def test_a_run_without_summary_takes_its_targets_from_the_configuration(tmp_path, synthetic):
    folder = synthetic.make_run(tmp_path / "a", {1: 0.5}, rounds=2, summary=False, targets=(0.7,))
    run = read_run(folder)
    assert run.summary is None and targets_of([run]) == [0.7]


def test_targets_are_the_union(tmp_path, synthetic):
    runs = [
        read_run(synthetic.make_run(tmp_path / str(t), {1: 0.5}, rounds=1, targets=(0.9, t)))
        for t in (0.95, 0.5)
    ]
    assert targets_of(runs) == [0.5, 0.9, 0.95]


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_cut_last_line_is_ignored(tmp_path, synthetic, cut):
    folder = synthetic.make_run(tmp_path / "a", {1: 0.5}, rounds=3)
    log = folder / "rounds.jsonl"
    log.write_bytes(log.read_bytes()[: -1 - cut])
    assert [row["round"] for row in read_run(folder).rounds] == [1, 2]


def test_a_last_line_that_only_lacks_its_newline_counts(tmp_path, synthetic):
    folder = synthetic.make_run(tmp_path / "a", {1: 0.5}, rounds=3)
    log = folder / "rounds.jsonl"
    log.write_bytes(log.read_bytes().rstrip())
    assert len(read_run(folder).rounds) == 3


def _break(name, content):
    return lambda folder: (folder / name).write_text(content)


GOOD = '"downlink_bytes":1,"uplink_bytes":1,"flops_per_client":1,"wall_seconds":1'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"not a run folder, it has no config\.json"),
        (lambda f: (f / "rounds.jsonl").unlink(), r"not a run folder, it has no rounds\.jsonl"),
        (_break("config.json", "[1]"), "expected a JSON object, got list"),
        (_break("summary.json", "{"), r"summary\.json: not JSON"),
        (_break("rounds.jsonl", '{"round": 1\n{"round": 2}\n'), "line 1 is not JSON"),
        (_break("rounds.jsonl", '{"round": 1, \n'), "line 1 is not JSON"),
        (_break("rounds.jsonl", "3\n"), "line 1 is not a step of a run"),
        (_break("rounds.jsonl", '{"round": 1}\n'), "line 1 has no 'total'"),
        (_break("rounds.jsonl", '{"round":1,"total":{' + GOOD + "}}\n"), "'simulated_seconds'"),
        (_break("rounds.jsonl", '{"round":1,"stage":[1]}\n'), r"'stage' is \[1\], expected a str"),
        (_break("rounds.jsonl", '{"round":1,"method":3}\n'), "'method' is 3, expected a dict"),
        (_break("rounds.jsonl", '{"round":1,"total":{"downlink_bytes":"1"}}\n'), "got '1'"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, synthetic, damage, message):
    folder = synthetic.make_run(tmp_path / "a", {1: 0.5}, rounds=1)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_run(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        read_run(tmp_path / "none")
