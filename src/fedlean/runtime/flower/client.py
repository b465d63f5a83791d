"""The device's half of the Flower app, for stock SuperNodes and Flower's simulation.

A stock node starts a new process per message, so everything held is on disk; in simulation a
process serves many virtual nodes, one after the other, and keeps their workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlean.data.dataset import Dataset
from fedlean.data.declared import Declared
from fedlean.runtime.flower.content import NotOurs, from_record, to_record
from fedlean.runtime.remote.share import Share, client_share, load_share
from fedlean.runtime.remote.worker import Worker, trouble

STATE = "~/.local/state/fedlean"
_workers: dict[tuple[Path, Share], Worker] = {}


def client_app() -> ClientApp:
    """Answers every message of the server's half."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            reply = _worker(context).answer(from_record(message.content))
        except (NotOurs, ValueError) as error:  # the node's or the run's configuration
            reply = trouble(str(error))
        return Message(content=to_record(reply), reply_to=message)

    return app


def _worker(context: Context) -> Worker:
    node, run = context.node_config, context.run_config
    base = Path(str(node.get("state") or run.get("state") or STATE)).expanduser()
    share = _share(node, run)
    folder = base / (f"client-{share.client}" if share.client is not None else str(context.node_id))
    key = (folder, share)
    if key not in _workers:
        name = str(node.get("data") or run.get("dataset") or "digits")
        dataset = _dataset(name, _declared(node, run))
        _workers[key] = Worker(
            folder,
            client_share(dataset, share),
            client=share.client,
            engine=str(run.get("engine") or "native"),
            methods=[str(run.get("method", ""))],  # who submits the app runs code here anyway
        )
    return _workers[key]


def _share(node: Mapping[str, Any], run: Mapping[str, Any]) -> Share:
    """What of the data set is this node's; without a partition id, all of it."""
    if "partition-id" not in node:
        return Share()
    return Share(
        client=int(node["partition-id"]),
        clients=int(run.get("clients", node.get("num-partitions", 1))),
        partition=str(run.get("partition", "iid")),
        seed=int(run.get("seed", 0)),
    )


def _declared(node: Mapping[str, Any], run: Mapping[str, Any]) -> Declared:
    """What a node says about its data, and the run where it says nothing."""
    layout, label, length = (
        node.get(name) or run.get(name) for name in ("layout", "label", "length")
    )
    return Declared(
        str(layout or ""), str(label or ""), int(length) if length else None, _test_share(node, run)
    )


def _test_share(node: Mapping[str, Any], run: Mapping[str, Any]) -> float:
    """Of the run's own data set, of which a node in a simulation holds a part."""
    return 0.0 if node.get("data") else float(run.get("test-share") or 0)


@lru_cache(maxsize=2)
def _dataset(name: str, declared: Declared) -> Dataset:
    # without the test set, which no client uses
    return load_share(name, Share(), declared=declared).dataset
