"""A transition needs hardly more memory than a training step."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from repr_det import RePr

NORMS = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d}
# Freed memory goes back to the system at once: what malloc keeps differs between machines, by 10 % of a step.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is reset on Linux only")
@pytest.mark.parametrize("norm", NORMS)
def test_a_drop_and_a_restore_need_little_more_memory_than_a_step(norm):
    """A ResNet-18 on small images, where a step keeps little: at 800 px nothing comes on top of it."""
    command = [sys.executable, __file__, norm]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVEN_BACK)
    found = [float(number) for number in re.findall(r"(?:drop|restore) ([\d.]+)", done.stdout)]
    assert len(found) == 2 and max(found) <= 1.1, done.stdout


def peak(action) -> int:
    """The most kB that were resident while ``action`` ran."""
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def main(norm: str) -> None:
    """Prints what each transition needs, in training steps."""
    torch.manual_seed(0)
    net = resnet18(num_classes=10, norm_layer=NORMS[norm])
    batches = [(torch.randn(16, 3, 128, 128), torch.randint(10, (16,))) for _ in range(4)]
    optimizer = torch.optim.SGD(net.parameters(), 1e-5, momentum=0.9)
    options = {"s1_iters": 2, "s2_iters": 1, "num_cycles": 1, "criterion_batches": 2, "calibration_batches": 1}
    loss = lambda batch: F.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    training = RePr(net, optimizer, 4, loader=batches, loss=loss, **options)

    def step() -> None:
        optimizer.zero_grad()
        loss(batches[0]).backward()
        optimizer.step()

    steps, transitions, done = [], {}, []
    for _ in range(3):
        steps.append(peak(step))
        most = peak(lambda: done.append(training.step()))
        if done[-1] is not None:
            transitions[done[-1].event] = most
    for event, most in transitions.items():
        print(event, most / max(steps[1:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
