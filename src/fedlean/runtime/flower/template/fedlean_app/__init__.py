"""A FedLean run as a Flower app: pyproject.toml says which."""
