"""One process of prunefl_memory.py: a device's round of PruneFL; prints its peak memory as JSON.

The order comes as bytes, the model packed in it, and the answer is encoded, as on a device.
"""

from __future__ import annotations

import sys
from pathlib import Path

from memory_process import EXAMPLES, peak_bytes


def main(order: str, threads: str) -> dict:
    import numpy as np

    from fedlean import wire
    from fedlean.core import generator
    from fedlean.data.batches import ClientData
    from fedlean.data.dataset import Dataset
    from fedlean.engine.open import open_engine
    from fedlean.methods.prunefl import client_update

    rng = generator(0, 0, 0, "benchmark")
    images = rng.integers(0, 256, (EXAMPLES, 1, 28, 28), np.uint8)
    labels = rng.integers(0, 62, EXAMPLES)
    few = images[:62], np.arange(62)
    data = Dataset.from_images("noise", (images, labels), few, classes=62, scale=255.0)
    engine, batches = open_engine("native", int(threads)), ClientData(data, np.arange(EXAMPLES))
    before = peak_bytes()
    task = wire.decode_task(Path(order).read_bytes(), {}, {})
    update, _ = client_update(task, batches, engine, {})
    answer = wire.encode_update(update, task)
    return {"before_bytes": before, "answer_bytes": len(answer)}


if __name__ == "__main__":
    report = main(*sys.argv[1:])
    report["peak_bytes"] = peak_bytes()

    import json  # after the measurement

    print(json.dumps(report))
