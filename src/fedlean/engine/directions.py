"""Random directions for zeroth-order training, the same bits on every machine.

A direction z_k is drawn tensor by tensor from a counter-based generator whose key follows from
(seed, k, tensor), so nobody stores or sends it: server, client and the native engine each draw it
again.  Only integers and table look-ups make a value (no logarithm, no square root), and a pruned
coordinate takes no number.  Philox4x64-10 is Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.

Normal values are read off a table of 65,536 quantiles: the largest is 4.32, the mean is 0 and the
mean square 1 to float32 rounding.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import Literal, get_args

import numpy as np

from fedlean.core import derive_seed

Kind = Literal["gaussian", "sign", "rank1"]

_ENTRIES = 1 << 16
_TABLE_HASH = "65561716612ffbcbfd947ed80353b542"


def direction_key(seed: int, k: int, purpose: str) -> int:
    """The 63-bit Philox key of direction `k` under `seed` for one tensor (or one factor of it)."""
    return derive_seed(seed, 0, k, f"direction/{purpose}")


def raw_words(key: int, count: int) -> np.ndarray:
    """The first `count` words (count,) uint64 of Philox4x64-10 under the key (key, 0).

    The first block of four words is that of counter 1, as NumPy counts.
    """
    return np.random.Philox(key=key).random_raw(count)


@cache
def normal_table() -> np.ndarray:
    """float32 (65536,), read-only: Φ⁻¹((u + 1/2) / 65536), scaled to a mean square of 1.

    Raises RuntimeError where this machine's arithmetic makes another table than everyone's.
    """
    from statistics import NormalDist  # memory that a process which draws none saves

    inverse = NormalDist().inv_cdf
    quantiles = [inverse((u + 0.5) / _ENTRIES) for u in range(_ENTRIES)]
    # the mean of each cell's middle cuts the tails a little: without it the mean square is 0.99998
    scale = math.sqrt(_ENTRIES / math.fsum(q * q for q in quantiles))
    table = (np.array(quantiles) * scale).astype(np.float32)
    table.flags.writeable = False
    found = hashlib.blake2b(table.astype("<f4").tobytes(), digest_size=16).hexdigest()
    if found != _TABLE_HASH:
        raise RuntimeError(
            f"the table of normal quantiles hashes to {found}, expected {_TABLE_HASH}: this "
            "machine's logarithm rounds otherwise, so it cannot take part in shared directions"
        )
    return table


def normals(key: int, count: int) -> np.ndarray:
    """`count` normal values (count,) float32: four to a word, its lowest 16 bits first."""
    words = raw_words(key, -(-count // 4))
    return normal_table()[words.astype("<u8").view("<u2")[:count]]


def signs(key: int, count: int) -> np.ndarray:
    """`count` values ±1 (count,) float32: 64 to a word, its lowest bit first, 0 means -1."""
    words = raw_words(key, -(-count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
    return np.where(bits, np.float32(1), np.float32(-1))


def direction(
    seed: int,
    k: int,
    tensor: str,
    shape: tuple[int, ...],
    mask: np.ndarray | None,
    kind: Kind,
) -> np.ndarray:
    """z_k of one tensor at its kept coordinates (K,) float32, in row-major order.

    `mask` is bool of `shape`, or None where all are kept.  gaussian and sign draw one value per
    kept coordinate; rank1 is u·vᵀ of two normal vectors over the rows and the rest of the tensor
    (a tensor of one axis has plain normal values).

    Raises ValueError for an unknown kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind of direction is {kind!r}; it must be one of {get_args(Kind)}")
    if kind == "rank1" and len(shape) > 1:
        rows = normals(direction_key(seed, k, f"{tensor}/rows"), shape[0])
        columns = normals(direction_key(seed, k, f"{tensor}/columns"), math.prod(shape[1:]))
        product = np.multiply.outer(rows, columns)
        return product.reshape(-1) if mask is None else product[mask.reshape(product.shape)]
    count = math.prod(shape) if mask is None else int(np.count_nonzero(mask))
    draw = signs if kind == "sign" else normals
    return draw(direction_key(seed, k, tensor), count)
