"""The command `fedlean`.  A device's process (`fedlean node`) loads only what it needs."""

from __future__ import annotations

import os
import sys

BAD_INPUT = 2


def main() -> None:
    try:
        _main()
    except (MemoryError, ImportError) as error:  # what is loaded late may not fit, either
        if not _is_memory(error):
            raise
        reason = (
            " ".join(str(error.__cause__ or error).split())[-200:] or "a small piece did not fit"
        )
        sys.stderr.write(f"fedlean: out of memory: {reason}\n")
        sys.exit(BAD_INPUT)


def _main() -> None:
    if sys.argv[1:2] == ["node"]:
        # NumPy's BLAS, which a node does not use, reserves 40 MB for every thread it starts.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from fedlean.runtime.flower.node import main as node

        sys.exit(node(sys.argv[2:]))
    from fedlean.cli import main as command_line

    command_line()


def _is_memory(error: BaseException) -> bool:
    """Of a library that could not be mapped, the dynamic linker's words are all there is."""
    said = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(each in str(error) for each in said)


if __name__ == "__main__":
    main()
