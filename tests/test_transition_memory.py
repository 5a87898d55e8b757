"""A transition needs hardly more memory than a training step."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("transition_memory.py")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is reset on Linux only")
@pytest.mark.parametrize(("norm", "criterion", "percent"), [("BN", "ortho", 5), ("FrozenBN", "ortho", 10)])
def test_a_drop_and_a_restore_need_little_more_memory_than_a_step(norm, criterion, percent):
    """Of a ResNet-18 on small images, where a step keeps little: at 800 px nothing comes on top of it."""
    command = [sys.executable, str(SCRIPT), "resnet18", "128", "16", norm, criterion]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [float(number) for number in re.findall(r"([+-][\d.]+) %", done.stdout)]
    assert len(found) == 2 and max(found) <= percent, done.stdout
