"""The server's half."""

from fedlean.runtime.flower.server import server_app

app = server_app()
