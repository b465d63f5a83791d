"""`import fedlean` is light, and its names are there when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fedlean as fl

MEGABYTES = 15
HEAVY = ("torch", "flwr", "matplotlib", "sklearn", "rich", "safetensors", "numpy")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def resident(imports: str) -> int:
    """Kibibytes of a process that has done `imports`."""
    return int(
        python(
            f"{imports}\n"
            "for line in open('/proc/self/status'):\n"
            "    if line.startswith('VmRSS'): print(line.split()[1])"
        )
    )


def test_it_loads_nothing():
    assert python(f"import sys, fedlean; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_it_takes_little_memory():
    assert resident("import fedlean") - resident("pass") < MEGABYTES * 1024


def test_the_door_loads_no_torch():
    code = (
        "import sys, fedlean as fl\n"
        "for name in dir(fl): getattr(fl, name)\n"
        "fl.train('fedavg', rounds=1, clients=2, local_steps=1, say=print)\n"
        "print([m for m in ('torch', 'flwr', 'matplotlib') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_train_is_the_function_whatever_was_imported_first():
    code = (
        "import fedlean.train.sgd, fedlean as fl\n"
        "from fedlean.train.sgd import local_sgd\n"
        "import fedlean.train.work\n"
        "print(fl.train.__module__, fl.method.local_sgd is local_sgd)"
    )
    assert python(code) == "fedlean.api.train True"


def test_names():
    asked = "Dataset Model ModelSpec train resume compare plan Run Device Fleet method load"
    assert set(asked.split()) <= set(dir(fl))
    with pytest.raises(AttributeError, match=r"no name 'trian'; there are .*train"):
        fl.trian  # noqa: B018
