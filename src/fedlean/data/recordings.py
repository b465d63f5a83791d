"""WAV files by class, as signals of one length, read with Python's own `wave`."""

# C channels, L samples

from __future__ import annotations

import wave
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedlean.data.byclass import Files, by_class_source, find_by_class
from fedlean.data.declared import NOTHING, Declared
from fedlean.data.source import READING_BYTES, Room, Source, unlimited

ENDINGS = frozenset({".wav"})
SILENCE = {1: 128}  # of unsigned bytes; of wider samples 0
TYPES = {1: np.uint8, 2: np.int16, 3: np.float32, 4: np.float32}  # by bytes of a sample
MOST_SAMPLES = 1 << 26


class _Form(NamedTuple):
    """What all recordings of a set have in common."""

    channels: int
    sample_bytes: int
    rate: int  # samples a second


def find_recordings(folder: Path) -> dict[str, Files]:
    """{"recordings": files} where a folder holds WAV files by class, else {}."""
    files = find_by_class(folder, ENDINGS)
    return {"recordings": files} if files else {}


def recordings_source(
    name: str, files: Files, room: Room = unlimited, declared: Declared = NOTHING
) -> Source:
    """Signals (C, L): samples of 8 bits as bytes, of 16 as they are, wider ones as floats in -1..1.

    L is the declared length, to which each is cut at its end, or padded there with silence.
    Raises ValueError when no length is declared and they differ, when a file is damaged or of
    another form than the first, or what `room` raises.
    """
    every = [path for of in files.values() for path in of]
    form, length = _form(every[0]), declared.length or _one_length(every)
    if length > MOST_SAMPLES:
        raise ValueError(f"{name}: signals of {length} samples, expected at most {MOST_SAMPLES}")
    dtype = np.dtype(TYPES[form.sample_bytes])
    scale = 255.0 if form.sample_bytes == 1 else 1.0

    def examine(path: Path) -> tuple[tuple[int, ...], np.dtype, float]:
        return (form.channels, length), dtype, scale

    def decoding_bytes(path: Path) -> int:
        return READING_BYTES + 4 * length * form.channels * 4

    decode = partial(_decode, form=form, first=every[0])
    return by_class_source(name, files, room, examine, decode, decoding_bytes)


def _one_length(paths: list[Path]) -> int:
    lengths = {}
    for path in paths:
        with _opened(path) as file:
            lengths.setdefault(file.getnframes(), path)
    shortest, longest = min(lengths), max(lengths)
    if shortest != longest:
        raise ValueError(
            f"recordings of {shortest} samples ({lengths[shortest]}) to {longest}"
            f" ({lengths[longest]}): give the length of all with --length; longer ones are cut,"
            " shorter ones padded with silence"
        )
    return shortest


def _form(path: Path) -> _Form:
    with _opened(path) as file:
        return _Form(file.getnchannels(), file.getsampwidth(), file.getframerate())


def _decode(path: Path, out: np.ndarray, *, form: _Form, first: Path) -> None:
    with _opened(path) as file:
        found = _Form(file.getnchannels(), file.getsampwidth(), file.getframerate())
        if found != form:
            raise ValueError(
                f"{path}: got {found.channels} channels of {8 * found.sample_bytes} bits at"
                f" {found.rate} Hz, expected {form.channels} of {8 * form.sample_bytes} bits at"
                f" {form.rate} Hz like {first.name}; convert it"
            )
        data = file.readframes(out.shape[1])
    samples = _samples(data, form.sample_bytes).reshape(-1, form.channels)
    out[...] = SILENCE.get(form.sample_bytes, 0)
    out[:, : len(samples)] = samples.T


def _samples(data: bytes, sample_bytes: int) -> np.ndarray:
    """Little endian, as WAV is: unsigned bytes, else signed."""
    if sample_bytes == 1:
        return np.frombuffer(data, np.uint8)
    if sample_bytes == 2:
        return np.frombuffer(data, "<i2")
    if sample_bytes == 4:
        return np.frombuffer(data, "<i4").astype(np.float32) / np.float32(2**31)
    wide = np.zeros((len(data) // 3, 4), np.uint8)
    wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    return wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)


@contextmanager
def _opened(path: Path) -> Iterator[wave.Wave_read]:
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() not in TYPES or not file.getnchannels():
                raise ValueError(f"{8 * file.getsampwidth()} bits a sample, expected 8 to 32")
            yield file
    except (wave.Error, EOFError, OSError, ValueError) as error:
        said = str(error)
        if not said.startswith(str(path)):
            said = f"{path}: {said or 'it ends early'}; expected PCM in a WAV file"
        raise ValueError(said) from error
