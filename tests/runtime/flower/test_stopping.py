"""SIGTERM ends a node's process, also in the middle of native code."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

NODE = """
import hashlib, signal, sys, threading, time
from fedlean.runtime.flower.node import Stopped, _stop
from fedlean.runtime.flower.stopping import ends_soon
signal.signal(signal.SIGTERM, _stop)
def leave():
    print("left", flush=True)
def at_work(cpu_seconds):
    until = time.process_time() + cpu_seconds
    while time.process_time() < until:
        time.sleep(0.01)
    print("at work", flush=True)
try:
    with ends_soon(leave, seconds=1.0):
        {work}
except Stopped:
    print("stopped", flush=True)
"""
# Native code says that it is at work once it has used the processor: a signal that came between the
# line that says so and the call would find Python at its own instructions.
WORK = {
    "native code that does not return": "threading.Thread(target=at_work, args=(0.3,)).start(); "
    "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)",
    "a loop of Python's": "at_work(0)\n        while True: pass",
    "waiting": "at_work(0); time.sleep(600)",
}


@pytest.mark.parametrize("name", WORK)
def test_a_signal_ends_it(name):
    code = NODE.replace("{work}", WORK[name])
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "at work\n"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    native = name.startswith("native")
    assert said == ("left\n" if native else "stopped\n")
    assert process.returncode == 0
    assert time.monotonic() - began < 10


def test_nothing_remains_of_a_block_that_ended():
    code = """
import os, signal, threading
from fedlean.runtime.flower.stopping import ends_soon
before = os.listdir("/proc/self/fd")
with ends_soon(lambda: None):
    pass
assert os.listdir("/proc/self/fd") == before and threading.active_count() == 1
assert signal.set_wakeup_fd(-1) == -1
"""
    if sys.platform == "linux":
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
