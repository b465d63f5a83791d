"""What a server knows of its devices."""

from __future__ import annotations

from dataclasses import replace

from fedlean.algorithm import Device, profile_of
from fedlean.cost.profile import load_profile


def test_a_device_counts_with_its_own_profile_else_with_the_servers():
    pi, generic = load_profile("raspberry_pi_4"), load_profile("generic")
    assert profile_of(Device(0), pi) is pi
    assert profile_of(Device(0, profile=generic), pi) is generic
    assert profile_of(Device(0, memory_bytes=7), pi) == replace(pi, memory_bytes=7)
    assert profile_of(Device(0, profile=generic, memory_bytes=7), pi) == replace(
        generic, memory_bytes=7
    )
