"""The server's half of the Flower app: FedLean's own round loop over the Grid."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlean.runtime.flower.post import GridPost
from fedlean.runtime.flower.serve import serve
from fedlean.runtime.flower.settings import server_settings

log = logging.getLogger("flwr")  # the one whose lines `flwr run --stream` shows


def server_app(report: Callable[[Path], str] = lambda folder: f"done: {folder}") -> ServerApp:
    """The app that the run configuration describes (see `settings.KNOWN`).

    `report` gets the folder of the finished run and gives the last line of the log.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings = server_settings(context.run_config)
        serve(GridPost(grid), settings)
        log.info(report(settings.out.expanduser().resolve()))

    return app
