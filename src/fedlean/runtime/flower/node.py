"""`fedlean node`: a device of a stock SuperLink, one warm process without PyTorch and without flwr.

Its own parser and few imports, for every megabyte that is loaded here is missing in training.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fedlean.data.declared import Declared
from fedlean.runtime.flower.address import parse_address
from fedlean.runtime.flower.identity import PrivateKey, read_key
from fedlean.runtime.flower.proxy import proxy_for
from fedlean.runtime.flower.stopping import ends_soon
from fedlean.runtime.flower.superlink import Incoming, LinkError, SuperLink
from fedlean.runtime.remote.share import Share, load_share
from fedlean.runtime.remote.worker import MAX_TASK_SECONDS, Worker, message_limit_bytes

log = logging.getLogger("fedlean")
BAD_INPUT, INTERRUPTED = 2, 130
EAGER_SECONDS = 30.0  # after a message, in which the next is looked for often: a round of a fleet
EAGER_POLL_SECONDS = 0.2
_M_MMAP_THRESHOLD = -3  # malloc.h
MAPPED_FROM_BYTES = 1 << 20
_TRIAL_BYTES = 1 << 16  # a full disk may still take a name
MIN_LIMIT_BYTES = 64_000_000  # below, the process does not even start
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Stopped(BaseException):
    """SIGTERM or SIGINT came; not an Exception, so that a task does not swallow it."""


class _Parser(argparse.ArgumentParser):
    """Bad usage is one line, as of every other command."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = _Parser(
        prog="fedlean node", description="Take part in a federation as one of its devices."
    )
    add = parser.add_argument
    add(
        "--superlink",
        required=True,
        metavar="HOST:PORT",
        help="the SuperLink to join (or https://HOST:PORT)",
    )
    add(
        "--data",
        type=os.path.expanduser,
        required=True,
        help="folder of this device's examples (fedlean datasets)",
    )
    add("--layout", default="", help="what the axes of its arrays are, e.g. ncl (docs/data.md)")
    add("--label", default="", help="the column of a table that holds the classes")
    add("--length", type=int, help="samples to which recordings are cut or padded")
    add("--test-share", type=float, default=0.0, help="of a shared set: held out as the run does")
    add("--tls-ca", type=_path, help="PEM file of the authority of the SuperLink's certificate")
    add("--key", type=_path, help="this node's private key (ssh-keygen -t ecdsa -b 384 -N '')")
    add(
        "--insecure", action="store_true", help="do without --key, or without both; for trials only"
    )
    add(
        "--memory-limit",
        type=_bytes,
        help="of this process, e.g. 128MB; what needs more is refused",
    )
    add("--state", type=_path, default="~/.local/state/fedlean", help="folder to keep files in")
    add("--client", type=_share, metavar="I/N", help="be client I of N (and hold that share)")
    add("--whole", action="store_true", help="with --client: all of --data is this client's")
    add("--partition", default="iid", help="how --client's share is dealt (default: iid)")
    add("--seed", type=int, default=0, help="of that partition (default: 0)")
    add("--name", default="", help="shown in the server's log")
    add("--threads", type=int, default=1, help="of the native engine (default: 1)")
    add("--poll", type=float, default=1.0, metavar="SECONDS", help="between looks for messages (1)")
    add(
        "--max-task-seconds",
        type=float,
        default=MAX_TASK_SECONDS,
        metavar="SECONDS",
        help=f"after which a task is given up ({MAX_TASK_SECONDS:g}); the server's deadline may "
        "be shorter",
    )
    add(
        "--allow-method",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="may run, too",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Serves until SIGTERM or SIGINT; the exit code."""
    options = parser().parse_args(arguments)
    os.umask(0o077)  # models and sums of gradients are nobody else's business
    _give_back_what_is_freed()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        link = connection(options)
        worker = device(options, link.device)
        _check_writable(options.state / _folder_name(options))
    except (ValueError, OSError) as error:
        return _fail(error)
    except MemoryError as error:
        return _fail(f"out of memory for {options.data}: {error or 'a small piece did not fit'}")
    except Stopped:
        return INTERRUPTED
    try:
        with ends_soon(link.close):
            link.activate()
            serve(link, worker, poll_seconds=options.poll)
    except Stopped:
        return 0
    except LinkError as error:
        return _fail(error)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # leaving takes a moment; once is enough
        link.close()


def _fail(error: Exception | str) -> int:
    sys.stderr.write(f"fedlean node: {' '.join(str(error).split())}\n")
    return BAD_INPUT


def connection(options: argparse.Namespace) -> SuperLink:
    """Raises ValueError for what is missing or unreadable."""
    key: PrivateKey | None = read_key(options.key) if options.key else None
    proxy = proxy_for(parse_address(options.superlink), tls=options.tls_ca is not None)
    if proxy is not None:
        log.info("through %s", proxy)
    return SuperLink(
        options.superlink,
        proxy=proxy,
        key=key,
        root_certificates=options.tls_ca,
        insecure=options.insecure,
        limit_bytes=message_limit_bytes(options.memory_limit),
        say=log.info,
    )


def device(options: argparse.Namespace, identity: str = "") -> Worker:
    """identity: the device by the node's key, if it has one.

    Raises ValueError for data that cannot be read or does not fit, and impossible numbers."""
    if options.poll <= 0:
        raise ValueError(f"--poll must be positive, got {options.poll:g}")
    if not 0 < options.max_task_seconds < 1e7:
        raise ValueError(
            f"--max-task-seconds must be a positive number of seconds, got "
            f"{options.max_task_seconds:g}"
        )
    index, clients = options.client or (None, 1)
    dealt = None if options.whole else index
    share = Share(dealt, clients, options.partition, options.seed)
    declared = Declared(options.layout, options.label, options.length, options.test_share)
    data = load_share(options.data, share, declared=declared, limit_bytes=options.memory_limit)
    log.info("%s examples of %s", data.num_examples, options.data)
    return Worker(
        options.state / _folder_name(options),
        data,
        client=index,
        name=options.name,
        identity=identity,
        threads=options.threads,
        memory_limit_bytes=options.memory_limit,
        methods=options.allow_method,
        max_task_seconds=options.max_task_seconds,
    )


def serve(link: SuperLink, worker: Worker, *, poll_seconds: float) -> NoReturn:
    """Answers messages one after the other.  Raises Stopped, or LinkError where nothing helps."""
    last = time.monotonic()
    while True:
        incoming = _pulled(link)
        if incoming is not None:
            # Whoever still refers to a content keeps a whole model in memory.
            contents, incoming = [incoming.content], replace(incoming, content=b"")
            answer = partial(
                worker.answer,
                age_seconds=link.age_seconds(incoming),
                withdrawn=link.watch(incoming),
            )
            try:
                link.push(incoming, answer(contents.pop()))
            except LinkError as error:  # this reply is lost; the server asks again
                log.warning("%s", error)
            last = time.monotonic()
            continue
        eager = time.monotonic() - last < EAGER_SECONDS
        time.sleep(min(EAGER_POLL_SECONDS, poll_seconds) if eager else poll_seconds)


def _pulled(link: SuperLink) -> Incoming | None:
    try:
        return link.pull()
    except LinkError as error:
        if not error.retry:
            raise
        log.warning("%s", error)
        return None


def _give_back_what_is_freed() -> None:
    """Makes glibc map every large block on its own, so that freeing it shrinks the process.

    Left alone it starts to keep blocks of the size of a model as soon as one was freed.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _folder_name(options: argparse.Namespace) -> str:
    """Nodes of one machine do not share a folder, for they differ in key, data or number."""
    paths = [str(Path(each).absolute()) if each else "" for each in (options.key, options.data)]
    who = repr((*paths, options.client)).encode()
    address = str(parse_address(options.superlink))
    server = "".join(each if each.isalnum() else "-" for each in address)
    return f"{server}-{hashlib.blake2b(who, digest_size=6).hexdigest()}"


def _check_writable(folder: Path) -> None:
    """Raises ValueError: a node that finds this out later has trained in vain, task after task."""
    trial = folder / f"trial-{secrets.token_hex(8)}"  # where nobody can have put a link
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with trial.open("xb") as file:
                file.write(bytes(_TRIAL_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"--state: {folder} cannot be written ({error.strerror}): make it writable for this "
            "user, make room on its disk, or give another --state"
        ) from None


def _path(text: str) -> Path:
    """A shell leaves the ~ of --key=~/node.key to us."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # of ~somebody
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _share(text: str) -> tuple[int, int]:
    index, _, clients = text.partition("/")
    if not (index.isdigit() and clients.isdigit() and int(index) < int(clients)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(index), int(clients)


def _bytes(text: str) -> int:
    number = text.strip().upper()
    unit = next(
        (unit for unit in sorted(_UNITS, key=len, reverse=True) if number.endswith(unit)), ""
    )
    try:
        count = float(number.removesuffix(unit)) * _UNITS.get(unit, 1)
    except ValueError:
        count = 0.0
    if not MIN_LIMIT_BYTES <= count < 1e15:
        raise argparse.ArgumentTypeError(f"expected a size like 128MB, from 64MB on; got {text!r}")
    return int(count)
