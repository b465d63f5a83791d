"""The C++ tests, and what the compiled objects must look like."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_as_the_wheel_is_built(build_and_test):
    build_and_test("plain")


@pytest.mark.slow
def test_with_address_and_undefined_behaviour_checks(build_and_test):
    build_and_test("sanitized", "-DFEDLEAN_SANITIZE=ON")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbol types")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_kernel_objects_lend_no_inline_function(build_and_test):
    """An inline function that an object for AVX-512 defines is a weak symbol: the linker may pick
    it for everybody, and a processor without AVX-512 dies in code that never asked for it."""
    library = build_and_test("plain") / "native" / "libfedlean_core.a"
    listing = subprocess.run(
        ["nm", "--print-file-name", "--defined-only", "--demangle", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kernels = [
        line
        for line in listing.splitlines()
        if any(f":{name}.cpp.o:" in line for name in ("avx2", "avx512", "neon"))
    ]
    tables = [line for line in kernels if "_table" in line]
    weak = [line for line in kernels if line.split(maxsplit=2)[1] in "VWuvw"]
    assert tables, listing[:2000]
    assert not weak, "\n".join(weak)
