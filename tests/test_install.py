"""What `pip install` gives: built from the source distribution, in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fedlean"
LEFT_OUT = (".git", ".venv", "build", "dist", "runs", "__pycache__", ".*_cache", ".hypothesis")

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if "No matching distribution found for scikit-build-core" in done.stdout:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout
    return done.stdout


def files_of_package() -> set[str]:
    return {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def files_of_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("fedlean/")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy, so that no build leaves anything in the working tree."""
    copy = tmp_path_factory.mktemp("checkout") / "fedlean"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


@pytest.fixture(scope="module")
def dist(checkout) -> Path:
    """The folder of the source distribution and of the wheel built from it."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed")
    run(sys.executable, "-m", "build", checkout)
    return checkout / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def pure_wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pure")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLEAN_NATIVE", "OFF")
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, checkout)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def python(tmp_path) -> Path:
    """The interpreter of a new, empty environment."""
    venv.create(tmp_path / "venv", with_pip=True)
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, wheel: Path) -> None:
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--constraint", constraints, wheel)


def test_source_distribution_holds_everything_that_a_build_needs(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    native = {path for path in (ROOT / "native").rglob("*") if path.is_file()}
    assert not {path.relative_to(ROOT).as_posix() for path in native} - names
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md"} <= names


def test_wheel_holds_the_package_its_data_and_the_module(wheel):
    names = files_of_wheel(wheel)
    assert files_of_package() <= names
    (module,) = names - files_of_package()
    assert module.startswith("fedlean/_native.")
    assert module.endswith(".so")


def test_installs_light_packages_and_computes(wheel, python):
    install(python, wheel)
    listing = json.loads(
        run(python, "-m", "pip", "--disable-pip-version-check", "list", "--format", "json")
    )
    names = {package["name"].lower() for package in listing}
    assert {"fedlean", "numpy", "safetensors", "cyclopts", "rich"} <= names
    optional = {"torch", "flwr", "scikit-learn", "matplotlib", "pillow", "nanobind", "networkx"}
    assert not optional & names
    program = """
from fedlean.engine.open import open_engine
engine = open_engine("native", 1)
print(engine.name, engine.instruction_set)
"""
    assert run(python, "-c", program).startswith("native ")
    assert "prunefl" in run(python.with_name("fedlean"), "methods")


def test_pure_wheel_says_what_is_missing(pure_wheel, python):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert files_of_wheel(pure_wheel) == files_of_package()
    install(python, pure_wheel)
    program = """
from fedlean.engine.open import open_engine
try:
    open_engine("native", 1)
except ValueError as error:
    print(error)
"""
    message = run(python, "-c", program)
    assert "the native engine is not installed" in message
    assert "compiler" in message  # the remedy
