"""ADDRESS KEY CA LIMIT: a node that sends every content back, reversed, until SIGTERM."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from fedlean.runtime.flower.identity import read_key
from fedlean.runtime.flower.superlink import SuperLink


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(address: str, key: str, ca: str, limit: str) -> None:
    link = SuperLink(
        address,
        key=read_key(Path(key)),
        root_certificates=Path(ca),
        insecure=False,
        limit_bytes=int(limit),
        say=say,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        link.activate()
        link.pull()
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text().splitlines()
            say("RESIDENT " + next(line for line in status if "VmRSS" in line).split()[1] + " kB")
        assert not {"flwr", "flwr.common", "numpy", "torch", "httpx"} & set(sys.modules)
        while True:
            incoming = link.pull()
            if incoming is None:
                time.sleep(0.2)
            else:
                link.push(incoming, incoming.content[::-1])
    finally:
        link.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
