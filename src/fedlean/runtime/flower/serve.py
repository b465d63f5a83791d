"""One run over devices, begun or continued; knows a `Post` and not what carries it.

A run lives in its folder, as every run does: submitting the app again with the same folder goes on
where the last one stopped, also after the SuperLink died and declared the run failed.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlean.runtime.flower.settings import ServerSettings
from fedlean.runtime.local import Dispatch
from fedlean.runtime.remote.dispatch import RemoteDispatch
from fedlean.runtime.remote.exchange import Post
from fedlean.runtime.rounds import RunFailed
from fedlean.runtime.run import Connect, Parts, differences, read_config, resume, start

log = logging.getLogger("flwr")  # the one whose lines `flwr run --stream` shows


def serve(post: Post, settings: ServerSettings) -> dict[str, Any]:
    """Starts the run, or continues it where its folder holds one; the summary.

    Raises ValueError when the folder holds a run of another configuration.
    """
    out = settings.out.expanduser().resolve()
    config = settings.config
    if not (out / "config.json").is_file():
        log.info("run folder: %s", out)
        connect = over(post, settings, _owned(out))
        return start(config, out, _watch, log.info, connect=connect, checkpoint_seconds=0.0)
    held = read_config(out)
    if changed := differences(config, held):
        raise ValueError(
            f"{out} holds a run of another configuration ({', '.join(changed)}): choose another "
            "'out', or give it the settings it began with"
        )
    log.info("run folder: %s, which is continued", out)
    connect = over(post, settings, _owned(out))  # not before: a refused one ends nobody's run
    return resume(out, _watch, log.info, connect=connect, checkpoint_seconds=0.0)


def _owned(out: Path) -> Callable[[], None]:
    """Makes this process the owner of the run folder; the check raises RunFailed once it is not.

    The last one owns it: an app whose SuperLink was killed may live on for a while, and nobody
    should have to find and end it before the run can go on.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path, me = out.parent / f"{out.name}.owner", uuid.uuid4().hex
    path.write_text(me)

    def check() -> None:
        if path.read_text() != me:
            raise RunFailed(f"the app was submitted again and goes on with {out}: this one ends")

    return check


def over(post: Post, settings: ServerSettings, check: Callable[[], None] = lambda: None) -> Connect:
    """A dispatch to devices behind `post`; `check` may end the run at any step."""

    def connect(parts: Parts) -> Dispatch:
        return RemoteDispatch(
            post,
            method=parts.config.method,
            dataset=parts.dataset,
            clients=parts.config.clients,
            terms=settings.terms,
            say=log.info,
            check=check,
        )

    return connect


def _watch(entry: dict[str, Any]) -> None:
    """A line per step, where `flwr run --stream` and the SuperLink's log show it."""
    accuracy = "" if entry["accuracy"] is None else f" accuracy {entry['accuracy']:.2%}"
    missing = [f"{client}: {why}" for client, why in entry["refused"].items()]
    said = f"; refused {'; '.join(missing)}" if missing else ""
    absent = f"; absent {entry['absent']}" if entry["absent"] else ""
    log.info(
        "round %s (%s)%s density %.1f%% %.1f MB %.1f s%s%s",
        entry["round"],
        entry["phase"],
        accuracy,
        100 * entry["density"],
        (entry["total"]["downlink_bytes"] + entry["total"]["uplink_bytes"]) / 1e6,
        entry["wall_seconds"],
        absent,
        said,
    )
    unused = len(entry["absent"]) + len(entry["refused"])
    if entry["cohort"] and unused == len(entry["cohort"]):
        log.warning("nobody's answer to round %s could be used", entry["round"])
