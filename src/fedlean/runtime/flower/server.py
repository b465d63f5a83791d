"""The server's half of the Flower app: FedLean's own round loop over the Grid.

A run lives in its folder, as every run does: submitting the app again with the same folder goes on
where the last one stopped, also after the SuperLink died and declared the run failed.
"""

from __future__ import annotations

import fcntl
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlean.runtime.flower.post import GridPost
from fedlean.runtime.flower.settings import ServerSettings, server_settings
from fedlean.runtime.local import Dispatch
from fedlean.runtime.remote.dispatch import RemoteDispatch
from fedlean.runtime.remote.exchange import Post
from fedlean.runtime.run import Connect, Parts, read_config, resume, start

log = logging.getLogger("flwr")  # the one whose lines `flwr run --stream` shows


def server_app() -> ServerApp:
    """The app that the run configuration describes (see `settings.KNOWN`)."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(GridPost(grid), server_settings(context.run_config))

    return app


def serve(post: Post, settings: ServerSettings) -> dict[str, Any]:
    """Starts the run, or continues it where its folder holds one; the summary.

    Raises ValueError when the folder holds a run of another configuration, or is in use.
    """
    out = settings.out.expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{out.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another run works in {out}: wait for it, or stop it (flwr stop RUN NAME)"
            ) from None
        return _serve(post, settings, out)


def _serve(post: Post, settings: ServerSettings, out: Path) -> dict[str, Any]:
    config = settings.config
    connect, say = over(post, settings), log.info
    if not (out / "config.json").is_file():
        log.info("run folder: %s", out)
        return start(config, out, _watch, say, connect=connect, checkpoint_seconds=0.0)
    held = read_config(out)
    config = replace(config, engine=config.engine or held.engine)  # a folder names what ran
    if held != config:
        changed = [name for name in vars(config) if vars(config)[name] != vars(held)[name]]
        raise ValueError(
            f"{out} holds a run of another configuration ({', '.join(changed)}): choose another "
            "'out', or give it the settings it began with"
        )
    log.info("run folder: %s, which is continued", out)
    return resume(out, _watch, say, connect=connect, checkpoint_seconds=0.0)


def over(post: Post, settings: ServerSettings) -> Connect:
    """A dispatch to devices behind `post`."""

    def connect(parts: Parts) -> Dispatch:
        return RemoteDispatch(
            post,
            method=parts.config.method,
            dataset=parts.dataset,
            clients=parts.config.clients,
            terms=settings.terms,
            say=log.info,
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
    if len(entry["cohort"]) and len(entry["absent"]) + len(entry["refused"]) == len(
        entry["cohort"]
    ):
        log.warning("nobody's answer to round %s could be used", entry["round"])
