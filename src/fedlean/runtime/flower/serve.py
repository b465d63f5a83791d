"""One run over devices, begun or continued; knows a `Post` and not what carries it.

A run lives in its folder, as every run does: submitting the app again with the same folder goes on
where the last one stopped, also after the SuperLink died and declared the run failed.
"""

from __future__ import annotations

import logging
from typing import Any

from fedlean.runtime.config import differences, read_config
from fedlean.runtime.flower.settings import ServerSettings
from fedlean.runtime.how import Connect, How, Parts
from fedlean.runtime.local import Dispatch
from fedlean.runtime.remote.dispatch import RemoteDispatch
from fedlean.runtime.remote.exchange import Post
from fedlean.runtime.run import resume, start
from fedlean.runtime.trust import Named

log = logging.getLogger("flwr")  # the one whose lines `flwr run --stream` shows


def serve(post: Post, settings: ServerSettings) -> dict[str, Any]:
    """Starts the run, or continues it where its folder holds one; the summary.

    Raises ValueError when the folder holds a run of another configuration, or of other data.
    """
    out = settings.out.expanduser().resolve()
    config = settings.config
    how = How(_watch, log.info, over(post, settings), checkpoint_seconds=0.0, shared=True)
    if not (out / "config.json").is_file():
        log.info("run folder: %s", out)
        return start(config, out, how)
    held = read_config(out)
    # where its data lies is no matter: its fingerprint is compared
    changed = [name for name in differences(config, held) if name != "dataset"]
    if changed:
        raise ValueError(
            f"{out} holds a run of another configuration ({', '.join(changed)}): choose another "
            "'out', or give it the settings it began with"
        )
    log.info("run folder: %s, which is continued", out)
    accept = settings.accept_changed_data
    named = Named(config.method, config.model)  # the user's own words, held to be the folder's
    return resume(out, how, dataset=config.dataset, accept_changed_data=accept, named=named)


def over(post: Post, settings: ServerSettings) -> Connect:
    """A dispatch to devices behind `post`; it ends once another app owns the run folder."""

    def connect(parts: Parts) -> tuple[Dispatch, list[str]]:
        dispatch = RemoteDispatch(
            post,
            method=parts.config.method,
            dataset=parts.dataset,
            clients=parts.config.num_clients,
            terms=settings.terms,
            say=parts.say,
            check=parts.check,
            statistics=parts.algorithm.statistics,
            present=parts.present(),
        )
        return dispatch, []

    return connect


def _watch(entry: dict[str, Any]) -> None:
    """A line per step, where `flwr run --stream` and the SuperLink's log show it."""
    accuracy = "" if entry["accuracy"] is None else f" accuracy {entry['accuracy']:.2%}"
    missing = [f"{client}: {why}" for client, why in entry["refused"].items()]
    said = f"; refused {'; '.join(missing)}" if missing else ""
    absent = f"; absent {entry['absent']}" if entry["absent"] else ""
    left = [f"{client}: {why}" for client, why in entry["left_out"].items()]
    said += f"; left out {'; '.join(left)}" if left else ""
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
    if not (entry["cohort"] or entry["server_only"]):
        log.warning("round %s: %s", entry["asked_round"], entry["notes"][0])
    if entry["cohort"] and unused == len(entry["cohort"]):
        log.warning("nobody's answer to round %s could be used", entry["asked_round"])
