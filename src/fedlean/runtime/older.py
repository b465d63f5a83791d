"""Run folders of earlier versions, in today's words."""

from __future__ import annotations

from typing import Any

# Methods that read another run's mask themselves, and what they called the weights to start from.
_WEIGHTS = {
    "fixed_mask": ("initial", {"original": "original", "random": "random", "trained": "trained"}),
    "ntk_zo": ("masks_weights", {"initial": "original", "trained": "trained"}),
}


def in_todays_words(config: dict[str, Any]) -> dict[str, Any]:
    """`config.json`'s own fields; where a run starts from is now the run's, not its method's."""
    settings = config.get("settings")
    if config.get("method") not in _WEIGHTS or not isinstance(settings, dict):
        return config
    name, words = _WEIGHTS[config["method"]]
    if "masks_from" not in settings:
        return config
    rest = {key: value for key, value in settings.items() if key not in ("masks_from", name)}
    if not settings["masks_from"]:
        return {**config, "settings": rest}
    weights = words.get(settings.get(name, "original"), "original")
    if name == "masks_weights" and weights == "original" and settings.get("rescale", True):
        rest["rescale_given"] = True  # so they were
    start = settings["masks_from"]
    return {**config, "settings": rest, "start": start, "start_weights": weights}
