"""Files of fleets: what they may say, what is refused, and what a run folder keeps of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from fedlean.cost.profile import load_profile
from fedlean.fleet.load import load_fleet, recorded

PI, GENERIC = load_profile("raspberry_pi_4"), load_profile("generic")


@pytest.fixture
def written(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def present(path, step=1, clients=None, seed=0):
    fleet = load_fleet(path, PI).fleet
    return fleet.present(seed, step, clients or fleet.size or 0)


def refused(path):
    with pytest.raises(ValueError) as caught:
        load_fleet(path, PI)
    text = str(caught.value)
    assert text.startswith(f"fleet {str(path)!r}: ")
    return text.partition(": ")[2]


FIVE_LINES = """\
# boards whose free memory changes from round to round
devices = 20
profile = "raspberry_pi_4"
[memory_bytes]
uniform = [40e6, 300e6]
"""


def test_twenty_devices_with_drawn_memory_are_five_lines(written):
    assert len(FIVE_LINES.splitlines()) == 5
    path = written("fleet.toml", FIVE_LINES)
    first, second = present(path), present(path, step=2)
    assert [device.id for device in first] == list(range(20))
    assert all(device.memory_bytes and 40e6 <= device.memory_bytes <= 300e6 for device in first)
    assert first != second and first == present(path)


def test_json_says_the_same_as_toml(written):
    toml = written("fleet.toml", FIVE_LINES)
    document = {
        "devices": 20,
        "profile": "raspberry_pi_4",
        "memory_bytes": {"uniform": [40e6, 300e6]},
    }
    assert present(written("fleet.json", json.dumps(document))) == present(toml)


def test_without_a_number_it_is_of_every_client(written):
    path = written("fleet.toml", "memory_bytes = 5e7\n")
    assert load_fleet(path, PI).fleet.size is None
    assert [device.memory_bytes for device in present(path, clients=3)] == [50_000_000] * 3


def test_kinds_of_devices(written):
    path = written(
        "fleet.toml",
        """
        memory_bytes = 1e8
        [[devices]]
        count = 2
        [[devices]]
        profile = "generic"
        memory_bytes = 2e8
        uplink_bytes_per_second = 1e5
        """,
    )
    assert [(one.profile, one.memory_bytes) for one in present(path)] == [
        (PI, 100_000_000),
        (PI, 100_000_000),
        (replace(GENERIC, uplink_bytes_per_s=1e5), 200_000_000),
    ]


def test_budgets_of_a_round_are_given_or_drawn(written):
    path = written(
        "fleet.toml",
        """
        devices = 3
        budget_bytes = 5e6
        [budget_seconds]
        uniform = [10, 60]
        """,
    )
    first, second = present(path), present(path, step=2)
    assert [device.budget_bytes for device in first] == [5_000_000] * 3
    assert all(device.budget_seconds and 10 <= device.budget_seconds <= 60 for device in first)
    assert len({device.budget_seconds for device in first + second}) == 6
    for device in present(written("plain.toml", "devices = 2")):
        assert device.budget_bytes is None and device.budget_seconds is None
    table = "device,budget_bytes,budget_seconds\n0,1e6,\n1,,2.5\n"
    found = present(written("fleet.csv", table))
    assert [(one.budget_bytes, one.budget_seconds) for one in found] == [(10**6, None), (None, 2.5)]


def test_profiles_of_ones_own_are_found_beside_the_file(written, tmp_path):
    slow = asdict(replace(GENERIC, name="slow", memory_bytes=1000))
    written("slow.json", json.dumps(slow))
    path = written("fleet.toml", 'devices = 1\nprofile = "slow.json"\n')
    (device,) = present(path)
    assert device.profile == replace(GENERIC, name="slow", memory_bytes=1000)
    assert device.memory_bytes == 1000


TABLE = """\
device,memory_bytes,uplink_bytes_per_second,profile,compute_factor
1,5e7,1e5,generic,
0,,,,0.5
"""


def test_a_table(written):
    first, second = present(written("fleet.csv", TABLE))
    assert first.memory_bytes == PI.memory_bytes
    assert first.profile is not None
    assert first.profile.dense_flops_per_s == PI.dense_flops_per_s / 2
    assert second.memory_bytes == 50_000_000
    assert second.profile == replace(GENERIC, uplink_bytes_per_s=1e5)


TRACE = """\
round,device,memory_bytes,present
1,0,1e6,yes
1,1,2e6,yes
3,1,,no

4,1,4e6,true
4,2,5e6,1
"""


def there(path, step):
    return {device.id: device.memory_bytes for device in present(path, step)}


def test_a_trace(written):
    path = written("trace.csv", TRACE)
    both, first = {0: 1_000_000, 1: 2_000_000}, {0: 1_000_000}
    last = {0: 1_000_000, 1: 4_000_000, 2: 5_000_000}
    assert [there(path, step) for step in (1, 2, 3, 4, 9)] == [both, both, first, last, last]


def test_a_trace_of_seconds_holds_from_the_first_round_that_begins_no_earlier(written):
    """Rounds of 60 s begin at 0, 60, 120, ..."""
    written("trace.csv", "time_seconds,device,memory_bytes\n0,0,1e6\n60,0,2e6\n61,0,3e6\n")
    path = written("fleet.toml", 'trace = "trace.csv"\nround_seconds = 60\nprofile = "generic"\n')
    found = [there(path, step)[0] for step in (1, 2, 3, 4)]
    assert found == [1_000_000, 2_000_000, 3_000_000, 3_000_000]
    assert present(path)[0].profile == GENERIC


def test_a_record_gives_the_same_fleet_without_any_file(written, tmp_path):
    written("slow.json", json.dumps(asdict(replace(GENERIC, name="slow"))))
    written("trace.csv", "time_seconds,device,profile\n0,0,slow.json\n90,0,raspberry_pi_4\n")
    for name, text in (
        ("fleet.toml", 'trace = "trace.csv"\nround_seconds = 60\npresent = 0.5\n'),
        ("drawn.toml", FIVE_LINES),
        ("table.csv", TABLE),
    ):
        fleet, record = load_fleet(written(name, text), PI)
        again = recorded(json.loads(json.dumps(record)), PI)
        assert again == fleet


@pytest.mark.parametrize("record", [None, {}, {"name": "a.toml", "texts": {}, "profiles": {}}])
def test_a_damaged_record_is_a_value_error(record):
    with pytest.raises(ValueError):
        recorded(record, PI)


DOCUMENTS = {
    "memory = 3": "no key 'memory'; did you mean memory_bytes? known: devices, trace,",
    "devices = 0": "devices is 0, expected a number from 1 to",
    "devices = []": "devices is empty, expected a number, or a table for each kind",
    "devices = [3]": "devices[0] is 3, expected a table",
    "memory_bytes = 0": "memory_bytes is 0, expected bytes from 1 to 1e+18",
    "memory_bytes = nan": "memory_bytes is nan, expected bytes from 1 to 1e+18",
    "memory_bytes = '1 GB'": "memory_bytes is '1 GB', expected bytes from 1",
    "memory_bytes = {normal = [1, 2]}": "memory_bytes has the keys normal, expected one of uniform",
    "memory_bytes = {uniform = [3, 2]}": "memory_bytes has uniform = [3, 2], expected [lowest, hig",
    "memory_bytes = {uniform = [3, 2, 1]}": "memory_bytes has uniform = [3, 2, 1], expected",
    "memory_bytes = {choice = []}": "memory_bytes has choice = [], expected a list of values",
    "present = {loguniform = [0, 1]}": "the lowest above 0",
    "budget_bytes = 0": "budget_bytes is 0, expected bytes from 1 to 1e+18",
    "budget_seconds = -1": "budget_seconds is -1, expected seconds from 1e-06 to 1e+12",
    "budget_second = 3": "no key 'budget_second'; did you mean budget_seconds?",
    "present = 1.1": "present is 1.1, expected a probability from 0 to 1",
    "memory_bytes = {uniform = [1, 2], redrawn = 'daily'}": "memory_bytes has redrawn = 'daily'",
    "profile = 3": "profile is 3, expected a name from 'fedlean devices'",
    "profile = 'raspbery_pi_4'": "no device profile named 'raspbery_pi_4'; nearest: raspberry_pi_4",
    "round_seconds = 3": "round_seconds is of a trace, and there is none",
    "trace = 'none.csv'": "none.csv does not exist",
    "trace = 3": "trace is 3, expected the name of a CSV file",
    "trace = 'a.csv'\ndevices = 3": "devices and trace say the same: keep one of them",
    "trace = 'a.csv'\nround_seconds = 0": "round_seconds is 0, expected seconds from",
    "[[devices]]\nmemory_byte = 3": "devices[0]: no key 'memory_byte'; did you mean memory_bytes?",
    "[[devices]]\n[[devices]]\ncount = true": "devices[1]: count is True, expected a number from 1",
    "[[devices]]\npresent = 'no'": "devices[0]: present is 'no', expected a probability",
    "devices = ": "not TOML: Invalid value",
}


@pytest.mark.parametrize("text", DOCUMENTS)
def test_a_document_that_makes_no_sense_is_refused_by_key(written, text):
    assert DOCUMENTS[text] in refused(written("fleet.toml", text))


def test_texts_that_a_reader_cannot_take_are_refused(written):
    assert "not TOML" in refused(written("fleet.toml", "a=" + "[" * 5000))
    assert "field larger than field limit" in refused(
        written("fleet.csv", "device,memory_bytes\n0," + "9" * 200_000 + "\n")
    )


TABLES = {
    "": "line 1: no column device; the first line names the columns",
    "device,memory\n": "line 1: no column 'memory'; did you mean memory_bytes?",
    "device,device\n": "line 1: the column device is there twice",
    "memory_bytes\n3\n": "line 1: no column device",
    "device,round,time_seconds\n": "line 1: round and time_seconds say the same",
    "device,time_seconds\n0,0\n": "line 1: the column time_seconds needs to know how long a round",
    "device\n": "no device: expected a line for each below the first",
    "device\n0\n2\n": "no line for device 1; devices are numbered from 0, the highest here is 2",
    "device\n0\n\n0\n": "line 4: device 0 has a row for the same time in line 2",
    "device\nx\n": "line 2: device is 'x', expected a number from 0 to",
    "device,memory_bytes\n0,1,2\n": "line 2: 3 cells, expected 2 as in the first line",
    "device,memory_bytes\n0,40 MB\n": "line 2: memory_bytes is '40 MB', expected bytes from 1 to",
    "device,memory_bytes\n0,nan\n": "line 2: memory_bytes is 'nan', expected bytes from 1 to",
    "device,memory_bytes\n0,-3\n": "line 2: memory_bytes is '-3', expected bytes from 1 to",
    "device,present\n0,maybe\n": "line 2: present is 'maybe', expected a probability from 0 to 1",
    "device,round\n0,0\n": "line 2: round is '0', expected a whole number from 1",
    "device,round\n0,1.5\n": "line 2: round is '1.5', expected a whole number from 1",
    "device,profile\n0,pi\n": "line 2: no device profile named 'pi'; nearest:",
}


@pytest.mark.parametrize("text", TABLES)
def test_a_table_that_makes_no_sense_is_refused_by_line(written, text):
    assert refused(written("fleet.csv", text)).startswith(TABLES[text])


def test_times_that_are_none_are_refused_by_line(written):
    written("trace.csv", "device,time_seconds\n0,0\n0,later\n")
    path = written("fleet.toml", 'trace = "trace.csv"\nround_seconds = 60\n')
    expected = "trace 'trace.csv': line 3: time_seconds is 'later', expected a number of seconds"
    assert refused(path).startswith(expected)


def test_files_that_are_none_are_refused(written, tmp_path):
    assert "does not exist" in refused(tmp_path / "none.toml")
    assert "expected a file whose name ends in .toml, .json, .csv" in refused(written("f.txt", ""))
    (tmp_path / "wide.csv").write_bytes("device\n0\n".encode("utf-16"))
    assert "is not text in UTF-8" in refused(tmp_path / "wide.csv")
    assert "expected keys and values, got a list" in refused(written("fleet.json", "[]"))
