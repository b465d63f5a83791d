"""Random and extreme models and calls, for an engine that was built with address checks.

    python -m native.fuzz EXTENSION.so CASES [FIRST]

Prints the number of each case before it begins, so that the last line names the one that a checker
ended.  A case depends on its number alone.  Calls may raise ValueError, TypeError and MemoryError;
everything else ends the program.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from typing import Any

import numpy as np
from native.fuzz_draw import EDGES, SEEN, Draw, attempt


def load(path: str) -> Any:
    """The extension at `path` as fedlean._native, before anything imports that."""
    spec = importlib.util.spec_from_file_location("fedlean._native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fedlean._native"] = module
    spec.loader.exec_module(module)
    return module


def labels_that_change(engine: Any) -> None:
    """Another thread writes labels out of range while steps run."""
    from fedlean.core import SubModel
    from fedlean.engine.protocol import SGD
    from fedlean.layers import Linear
    from fedlean.spec import sequential

    spec = sequential((64,), [("a", Linear(64)), ("b", Linear(8))])
    params = {n: np.full(s, 0.01, np.float32) for n, s in spec.tensor_shapes.items()}
    session = engine.open(spec, params, SubModel(), batch_size=512, optimizer=SGD(0.0))
    x, y, stop = np.ones((512, 64), np.float32), np.zeros(512, np.int64), threading.Event()

    def write() -> None:
        while not stop.is_set():
            y[-1] = 2**29
            y[-1] = 0

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(200):
        attempt("changing labels", lambda: session.step(x, y))
    stop.set()
    writer.join()


def main() -> None:
    native = load(sys.argv[1])
    count = int(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    from native.fuzz_calls import merge_case, raw_case
    from native.fuzz_models import engine_case

    from fedlean.engine.native import NativeEngine

    np.seterr(all="ignore")
    engines = [NativeEngine(1), NativeEngine(2)]
    raw_engine = native.Engine(2)
    for number in range(first, first + count):
        os.write(1, f"case {number}\n".encode())
        draw = Draw(number)
        if number % 2:
            raw_case(draw, native, raw_engine)
        else:
            engine_case(draw, engines[number // 2 % 2])
        merge_case(draw, native)
    os.write(1, b"labels that change\n")
    labels_that_change(engines[0])
    for threads in EDGES:
        if threads < 1 or threads > 1024:
            attempt("threads", lambda n=threads: native.Engine(n))
    lines = [f"{what} {times}" for what, times in sorted(SEEN.items())]
    os.write(1, "\n".join([*lines, "done\n"]).encode())


if __name__ == "__main__":
    main()
