"""ADDRESS KEY CA STATE WHAT: a node with a valid key whose answers to tasks are not to be taken.

WHAT is a number: of bytes of every answer; or "attacks": every second answer is the next of
`rogue_answers.ATTACKS`, the others are honest.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

from runtime.flower.rogue_answers import ATTACKS, attacked

from fedlean.runtime.flower.identity import read_key
from fedlean.runtime.flower.superlink import SuperLink
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import unseal
from fedlean.runtime.remote.share import Share, load_share
from fedlean.runtime.remote.worker import Worker

Answer = Callable[[bytes], bytes]


def answers(what: str, worker: Worker) -> Iterator[Answer]:
    """One per task."""
    if what.isdigit():
        while True:
            yield lambda content: bytes(int(what))
    for attack in cycle(ATTACKS.values()):
        yield lambda content, attack=attack: attacked(worker, content, attack)
        yield worker.answer


def main(address: str, key: str, ca: str, state: str, what: str) -> None:
    link = SuperLink(
        address,
        key=read_key(Path(key)),
        root_certificates=Path(ca),
        insecure=False,
        limit_bytes=1 << 28,
        say=print,
    )
    share = Share(1, 2 if what.isdigit() else 4)
    worker = Worker(Path(state), load_share("digits", share), client=1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    turns = answers(what, worker)
    try:
        link.activate()
        print("connected", flush=True)  # noqa: T201
        while True:
            incoming = link.pull()
            if incoming is None:
                time.sleep(0.2)
                continue
            asked = unseal(incoming.content, expected=tuple(env.KINDS)).kind
            answer = worker.answer if asked == env.HELLO else next(turns)
            link.push(incoming, answer(incoming.content))
    finally:
        link.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
