"""The command `fedlean`.  A device's process (`fedlean node`) loads only what it needs."""

from __future__ import annotations

import sys


def main() -> None:
    if sys.argv[1:2] == ["node"]:
        from fedlean.runtime.flower.node import main as node

        sys.exit(node(sys.argv[2:]))
    from fedlean.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
