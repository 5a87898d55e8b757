"""Peak memory of a few steps, each arm in a process of its own."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from repr_det.studies.benchmarking.case import Bench, Case
from repr_det.studies.benchmarking.steps import ARMS, MASKED, SLIM, STOCK

_STEPS = 4
# glibc returns every tensor to the system when it is freed; otherwise fragments make the peak vary by 5 % between runs.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(case: Case, config_file: str) -> dict[str, Any]:
    """Arm -> bytes: torch.cuda.max_memory_allocated on a GPU, the highest resident set of the process on a CPU.

    The sub-network's arms include the drop before and the restore after their steps.
    """
    peaks = {}
    for arm in ARMS:
        request = json.dumps({"case": dataclasses.asdict(case), "config_file": config_file, "arm": arm})
        command = [sys.executable, "-m", "repr_det.studies.benchmarking.memory", request, str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_ALLOCATOR})
        if done.returncode:
            raise RuntimeError(f"the process that measures memory of {arm!r} failed:\n{done.stderr[-2000:]}")
        peaks[arm] = int(done.stdout.split()[-1])
    return {"bytes": peaks, "ratio": {arm: peaks[arm] / peaks[STOCK] for arm in ARMS[1:]}}


def peak_memory(case: Case, config_file: str, arm: str) -> int:
    """Of this process, which must not have done anything else."""
    with Bench(case, config_file, repr_on=arm != STOCK) as bench:
        sub = arm in (MASKED, SLIM)
        if sub:
            # The optimizer's state exists at the first drop of a real run.
            bench.step(0)
            bench.hook.scheme.drop()
        slim = bench.slim() if arm == SLIM else None
        if slim is not None:
            slim.install()
        for number in range(_STEPS):
            bench.step(number)
        if slim is not None:
            slim.remove()
        if sub:
            bench.hook.scheme.restore()
    return highest_memory(case.device)


def highest_memory(device: str) -> int:
    """Bytes that this process has had at once: allocated by torch on a GPU, resident else."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # rusage would include the parent's peak: it survives fork and exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    print(peak_memory(Case(**asked["case"]), asked["config_file"], asked["arm"]))
