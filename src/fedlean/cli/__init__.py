"""The command line.  Exit codes: 0 done, 2 bad usage or input (one line), 130 interrupted.

A command's module is loaded when the command is named: listing methods loads no measurement, and a
run no Flower project.
"""

from __future__ import annotations

import sys
from typing import Any

from cyclopts import App, CycloptsError

import fedlean
from fedlean.cli.screen import say

BAD_INPUT, INTERRUPTED = 2, 130
HELP = frozenset({"--help", "-h"})
MAX_USAGE = 400  # characters of what is wrong with the options

app = App(
    name="fedlean",
    help="Federated learning in which every device trains only what it can afford.",
    version=fedlean.__version__,
    result_action="return_value",
)
# name -> where it is, and what its docstring says first: said here, so that --help loads none
COMMANDS = {
    "run": (
        "runs:run",
        "Train one model across simulated clients and write a run folder with a report.",
    ),
    "resume": (
        "runs:resume",
        "Continue an interrupted run, bit for bit; or extend a finished one.",
    ),
    "compare": ("comparison:compare", "One page over several runs; the first is the baseline."),
    "evaluate": ("results:evaluate", "How well a trained model does on a data set."),
    "predict": (
        "results:predict",
        "What a trained model makes of each example, as CSV: its class, and all probabilities.",
    ),
    "export": (
        "results:export_model",
        "Write a trained model for other programs: ONNX, PyTorch, safetensors or one C file.",
    ),
    "plan": (
        "plan:plan",
        "What each method would cost on a device, what fits, and what to choose.",
    ),
    "profile": (
        "profiles:profile",
        "Measure this device's time model and link into a profile for --device.",
    ),
    "node": (
        "deployment:node",
        "Take part in a federation as one of its devices (see fedlean node --help).",
    ),
    "app": ("deployment:flower_app", "FedLean as a Flower app."),
    "methods": ("listings:list_methods", "What can be run, one line each."),
    "models": ("listings:list_models", "Built-in models, one line each."),
    "datasets": (
        "listings:list_datasets",
        "Data sets and the folder layouts that are recognised.",
    ),
    "devices": ("listings:list_devices", "Device profiles for the emulated clock."),
}
for _name, (_place, _purpose) in COMMANDS.items():
    # the options of a node, --help among them, are its own
    _own: dict[str, Any] = {"help_flags": []} if _name == "node" else {}
    app.command(f"fedlean.cli.{_place}", name=_name, help=_purpose, **_own)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; never shows a traceback for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        method = _method_asked_about(arguments)
        app(arguments, exit_on_error=False, print_error=False)
        if method is not None:
            from fedlean.cli.method_help import show_settings

            show_settings(method)
    except CycloptsError as error:
        said = " ".join(str(error).split())  # it may repeat all of a value of any length
        _fail(f"{said[:MAX_USAGE]} (see fedlean --help)")
    except MemoryError as error:
        _fail(f"out of memory: {error or 'a small piece more did not fit'}")
    except KeyboardInterrupt:
        say("interrupted", style=None)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_end_of_a_run(error):
            raise
        _fail(" ".join(str(error).split()))


def _method_asked_about(arguments: list[str]) -> str | None:
    """The method of `run METHOD --help`, in any order; None where the arguments are none such."""
    if not arguments or arguments[0] != "run" or HELP.isdisjoint(arguments):
        return None
    names = [each for each in arguments[1:2] if not each.startswith("-")]
    return names[0] if names else None


def _is_end_of_a_run(error: RuntimeError) -> bool:
    """Whether it says why a run cannot go on; whoever raised it has loaded these."""
    from fedlean.runtime.local import ClientError
    from fedlean.runtime.lock import Superseded
    from fedlean.runtime.outofmemory import OutOfMemory
    from fedlean.runtime.rounds import RunFailed

    return isinstance(error, RunFailed | ClientError | Superseded | OutOfMemory)


def _fail(line: str) -> None:
    say(f"fedlean: {line}", style=None)
    sys.exit(BAD_INPUT)
