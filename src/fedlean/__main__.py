"""The command `fedlean`.  A device's process (`fedlean node`) loads only what it needs."""

from __future__ import annotations

import os
import sys


def main() -> None:
    if sys.argv[1:2] == ["node"]:
        # NumPy's BLAS, which a node does not use, reserves 40 MB for every thread it starts.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from fedlean.runtime.flower.node import main as node

        sys.exit(node(sys.argv[2:]))
    from fedlean.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
