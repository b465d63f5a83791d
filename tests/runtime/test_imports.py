"""What importing costs on a device, and which module may import which."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "flwr", "matplotlib", "sklearn", "PIL", "networkx"}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "module",
    [
        "fedlean",
        "fedlean.core",
        "fedlean.spec",
        "fedlean.wire",
        "fedlean.methods.fedavg",
        "fedlean.methods.prunefl",
        "fedlean.methods.smartfreeze",
        "fedlean.measure.device",
        "fedlean.runtime.run",
        "fedlean.cli",
        "fedlean.cli.runs",
        "fedlean.cli.comparison",
        "fedlean.cli.profiles",
        "fedlean.runtime.flower.node",
        "fedlean.runtime.flower.project",
        "fedlean.runtime.remote.worker",
    ],
)
def test_imports_nothing_heavy(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & {name.partition(".")[0] for name in done.stdout.split()}


def test_listing_loads_no_torch():
    code = (
        "import sys; from fedlean import cli\n"
        "for each in ('methods', 'models', 'datasets', 'devices'): cli.main([each])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_a_native_run_loads_no_torch(tmp_path):
    code = (
        "import sys; from fedlean import cli\n"
        f"cli.main(['run', 'prunefl', '--rounds', '1', '--out', {str(tmp_path / 'run')!r}])\n"
        "assert 'torch' not in sys.modules and 'fedlean._native' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not in a checkout")
def test_import_contracts():
    beside = str(Path(sys.executable).parent)
    lint = shutil.which("lint-imports", path=beside) or shutil.which("lint-imports")
    if lint is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
