"""FedLean: federated learning in which every device trains only what it can afford."""

__version__ = "0.1.0"
