"""What waits on disk: private, gone afterwards, and no harm where the disk is full."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from fedlean.runtime.waiting import NoRoom, Waiting, read


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_kept_is_read_again_and_goes(place):
    with Waiting("fedlean-test-") as waiting:
        assert not list(place.iterdir()), "no folder before it is needed"
        paths = [waiting.keep(content, "it") for content in (b"one", memoryview(b"two"), b"")]
        assert [read(path, "it") for path in paths] == [b"one", b"two", b""]
        assert len(list(place.iterdir())) == 1
    assert not list(place.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_nobody_else_can_read_it_or_guess_its_name(place):
    before = os.umask(0)
    try:
        with Waiting("fedlean-test-") as one, Waiting("fedlean-test-") as other:
            paths = [each.keep(b"secret", "it") for each in (one, one, other)]
            assert {mode(path) for path in paths} == {0o600}
            assert {mode(path.parent) for path in paths} == {0o700}
            assert len({path.name for path in paths} | {path.parent.name for path in paths}) == 5
    finally:
        os.umask(before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_leaves_no_half_of_it(place, monkeypatch):
    real = tempfile.mkstemp

    def on_a_full_disk(**where):
        descriptor, path = real(**where)
        os.close(descriptor)
        return os.open("/dev/full", os.O_WRONLY), path

    with Waiting("fedlean-test-") as waiting:
        kept = waiting.keep(b"before", "it")
        monkeypatch.setattr(tempfile, "mkstemp", on_a_full_disk)
        for content in (b"x", bytes(1 << 20)):  # fails when it is closed, and when it is written
            with pytest.raises(NoRoom) as caught:
                waiting.keep(content, "its reply")
            assert str(caught.value) == (
                "the server has no room for its reply: No space left on device: free space in "
                f"{place}, or set TMPDIR to another folder"
            )
        assert list(place.glob("*/*")) == [kept] and read(kept, "it") == b"before"


@pytest.mark.skipif(os.name != "posix", reason="the limit is POSIX's")
def test_a_file_that_may_not_grow(place):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with Waiting("fedlean-test-") as waiting:
            with pytest.raises(NoRoom, match="its reply: File too large: free space in"):
                waiting.keep(bytes(1 << 17), "its reply")
            assert read(waiting.keep(b"small", "its reply"), "it") == b"small"
            assert len(list(place.glob("*/*"))) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_no_folder_can_be_made(place, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(place / "gone"))
    with Waiting("fedlean-test-") as waiting:
        with pytest.raises(
            NoRoom, match=r"keep its reply: No such file or directory: look after .*/gone"
        ):
            waiting.keep(b"x", "its reply")
        (place / "gone").mkdir()  # somebody looked after it
        assert read(waiting.keep(b"x", "its reply"), "it") == b"x"


def test_where_there_is_no_place_for_temporary_files(place, monkeypatch):
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **k: nowhere())
    with (
        Waiting("fedlean-test-") as waiting,
        pytest.raises(NoRoom, match="cannot keep its reply: No usable"),
    ):
        waiting.keep(b"x", "its reply")


def test_what_has_gone_from_the_disk_is_said(place):
    with Waiting("fedlean-test-") as waiting:
        path = waiting.keep(b"x", "its reply")
        path.unlink()
        with pytest.raises(NoRoom, match="its reply: No such file"):
            read(path, "its reply")
