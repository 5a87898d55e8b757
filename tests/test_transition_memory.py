"""A transition needs hardly more memory than a training step."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("transition_memory.py")
# Freed memory goes back to the system at once: what malloc keeps differs between machines, by 10 % of a step.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is reset on Linux only")
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_a_drop_and_a_restore_need_little_more_memory_than_a_step(norm):
    """A ResNet-18 on small images, where a step keeps little: at 800 px nothing comes on top of it."""
    command = [sys.executable, str(SCRIPT), "resnet18", "128", "16", norm, "ortho"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVEN_BACK)
    found = [float(number) for number in re.findall(r"([+-][\d.]+) %", done.stdout)]
    assert len(found) == 2 and max(found) <= 10, done.stdout
