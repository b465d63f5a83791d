"""The server's half of the Flower app: FedLean's own round loop over the Grid."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlean.runtime.flower.post import GridPost
from fedlean.runtime.flower.serve import serve
from fedlean.runtime.flower.settings import server_settings


def server_app() -> ServerApp:
    """The app that the run configuration describes (see `settings.KNOWN`)."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(GridPost(grid), server_settings(context.run_config))

    return app
