"""Flower's object format: by hand, against flwr's own classes, and against what is not it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from hashlib import sha256
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.runtime.flower import objects
from fedlean.runtime.flower.objects import NotOurs, ObjectError, fill, open_array, open_pulled
from fedlean.runtime.flower.protobufs import _known_version

needs_flwr = pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed")


def stored(packed: objects.Packed) -> dict[str, bytes]:
    return {each.id: each.head + bytes(each.body) for each in objects.in_order(packed)}


def unpacked(packed: objects.Packed) -> bytes:
    held, (record,) = stored(packed), packed.children
    (array,) = record.children
    layout = open_array(memoryview(held[array.id]), array.id)
    buffer = bytearray(layout.length_bytes)
    fill(memoryview(buffer), layout, lambda name, most: memoryview(held[name]))
    return bytes(buffer)


def test_by_hand():
    """Two chunks of which one comes twice."""
    ab, c = b"ArrayChunk  2\0ab", b"ArrayChunk  1\0c"
    ids = [sha256(ab).hexdigest(), sha256(c).hexdigest()]
    body = b'{"dtype": "uint8", "shape": [5], "stype": "fedlean", "arraychunk_ids": [0, 0, 1]}'
    array = f"Array {','.join(ids)} {len(body)}\0".encode() + body
    record_body = b'{"message": "%s"}' % sha256(array).hexdigest().encode()
    record = f"ArrayRecord {sha256(array).hexdigest()} {len(record_body)}\0".encode() + record_body
    above_body = b'{"fedlean": "%s"}' % sha256(record).hexdigest().encode()
    above = f"RecordDict {sha256(record).hexdigest()} {len(above_body)}\0".encode() + above_body
    packed = objects.pack_content(b"ababc", chunk_bytes=2)
    assert list(stored(packed).values()) == [ab, c, array, record, above]
    assert packed.id == sha256(above).hexdigest()
    assert unpacked(packed) == b"ababc"


@given(st.binary(max_size=40), st.integers(1, 7))
def test_round_trip(content, chunk_bytes):
    assert unpacked(objects.pack_content(content, chunk_bytes)) == content


@needs_flwr
@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [1 << 16])
def test_agrees_with_flwr(chunk_bytes):
    source = Path(objects.__file__).parents[3]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]),
        "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(chunk_bytes),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    oracle = Path(__file__).with_name("oracle.py")
    done = subprocess.run(
        [sys.executable, str(oracle)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def tree(name: str, *children: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(object_id=name, children=list(children))


def test_names_above_the_array_follow_from_its_own():
    records = objects.pack_content(b"x")
    (record,) = records.children
    (array,) = record.children
    leaf = tree(array.id, tree("a chunk"))
    assert objects.array_name(tree("m", tree(records.id, tree(record.id, leaf)))) == array.id
    for bad in (
        tree("m"),
        tree("m", tree(records.id, tree(record.id, leaf), tree(record.id, leaf))),
        tree("m", tree(record.id, tree(record.id, leaf))),
        tree("m", tree(records.id, tree(records.id, leaf))),
        tree("m", tree(records.id, tree(record.id, tree("0" * 64)))),
        tree("m", tree(records.id, tree(record.id, tree("no name")))),
    ):
        with pytest.raises(NotOurs):
            objects.array_name(bad)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is no ArrayChunk"),
        (b"ArrayChunk  2", "is no ArrayChunk"),
        (b"Array  1\0x", "is no ArrayChunk"),
        (b"ArrayChunk 1\0x", "is no ArrayChunk"),
        (b"ArrayChunk  2\0x", "announces 2 bytes and has 1"),
        (b"ArrayChunk  01\0x", "announces 01 bytes"),
        (b"ArrayChunk  -1\0x", "announces -1 bytes"),
        (b"ArrayChunk abc 1\0x", "name is no SHA-256"),
        (b"ArrayChunk  1 " + b" " * 200 + b"\0x", "is no ArrayChunk"),
    ],
)
def test_objects_that_are_none(raw, says):
    with pytest.raises(ObjectError, match=says):
        objects.open_chunk(memoryview(raw), sha256(raw).hexdigest())


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b"3", b"[" * 100_000, b'{"shape": [3]'])
def test_arrays_that_are_none(body):
    array = objects.pack("Array", body)
    with pytest.raises(ObjectError):
        open_array(memoryview(array.head + body), array.id)


@needs_flwr
@given(st.booleans(), st.booleans(), st.binary(max_size=300))
def test_answers_to_a_pull(found, available, content):
    from fedlean.runtime.flower.protobufs import protobufs

    raw = protobufs().message.PullObjectResponse(
        object_found=found, object_available=available, object_content=content
    )
    assert open_pulled(memoryview(raw.SerializeToString())) == (found, available, content)


@given(st.binary(max_size=30))
def test_any_bytes_are_an_answer_or_an_object_error(raw):
    with suppress(ObjectError):
        open_pulled(memoryview(raw))


@needs_flwr
@given(st.integers(0, 1 << 18))
def test_a_bytes_field_is_protobufs(length):
    from fedlean.runtime.flower.protobufs import protobufs

    request = protobufs().message.PushObjectRequest
    content = bytes(length)
    head = objects.bytes_field(request.OBJECT_CONTENT_FIELD_NUMBER, (content[:3], content[3:]))
    if length:  # an empty field is left out by protobuf
        assert head + content == request(object_content=content).SerializeToString()
    assert request.FromString(head + content).object_content == content


@pytest.mark.parametrize("version", ["1.40.9", "1.43.0", "2.0", "unknown"])
def test_versions_that_nobody_tried(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ValueError, match=f"flwr {version} is installed.*>=1.41,<1.43"):
        _known_version()


@pytest.mark.parametrize("version", ["1.41.0", "1.42.3", "1.42.0rc1"])
def test_versions_that_are_known(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert _known_version() == version


def test_without_flwr(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ValueError, match=r"pip install 'flwr>=1.41,<1.43'"):
        _known_version()
