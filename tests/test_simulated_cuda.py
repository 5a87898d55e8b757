"""The tests of GPUs on two simulated devices, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simulated_cuda import missing

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device for these tests: pytest -m gpu")
@pytest.mark.skipif(bool(missing()), reason=f"the simulated device {missing()}")
def test_what_needs_a_gpu_passes_on_simulated_ones():
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "SIMULATED_CUDA_DEVICES": "2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "simulated_cuda.plugin", "-m", "gpu"]
    command += ["test_gpu.py", "test_ranks.py", "test_criteria.py"]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
