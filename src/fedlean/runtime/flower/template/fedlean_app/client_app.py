"""The devices' half, for stock SuperNodes and Flower's simulation."""

from fedlean.runtime.flower.client import client_app

app = client_app()
