"""The C++ tests on 64-bit ARM: cross-compiled, run under an emulator."""

from __future__ import annotations

import platform
import shutil

import pytest

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="test_cpp.py runs on ARM")
@pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None,
    reason=f"{COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu qemu-user) are not installed",
)
def test_under_emulation(build_and_test):
    build_and_test("aarch64", "--toolchain", "native/cmake/aarch64-linux-gnu.cmake")
