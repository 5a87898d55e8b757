"""Ranks agree on masks and weights: with gloo on the CPU, with NCCL on two GPUs."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import GPU, ROOT, assert_same_weights

TWO_GPUS = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from repr_det import RePr
from small_loop import OPTIONS, TwoConvs, batch
rank, port, norm, backend, out = int(sys.argv[1]), *sys.argv[2:]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
model = TwoConvs(norm).to(device)
wrapped = DistributedDataParallel(model, device_ids=[rank] if backend == "nccl" else None, broadcast_buffers=False)
optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
repr_training = RePr(wrapped, optimizer, 8, **OPTIONS, frozen_norm="keep")
events = []
for step in range(8):
    optimizer.zero_grad()
    wrapped(batch(2 * step + rank).to(device))["loss"].backward()
    optimizer.step()
    done = repr_training.step()
    events += [] if done is None else [done.event]
torch.save(({name: value.cpu() for name, value in model.named_parameters()}, events), out)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("backend", "norm"),
    [
        ("gloo", "BN"),
        pytest.param("nccl", "SyncBN", marks=TWO_GPUS),
        pytest.param("nccl", "FrozenBN", marks=TWO_GPUS),
    ],
)
def test_ranks_agree(tmp_path, backend, norm):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    files = [str(tmp_path / f"{rank}.pt") for rank in range(2)]
    words = [[sys.executable, "-c", RANK, str(rank), port, norm, backend, file] for rank, file in enumerate(files)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    processes = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}) for command in words]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (first, events), (second, _) = (torch.load(file, weights_only=True) for file in files)
    assert events == ["drop", "restore"]
    assert_same_weights(first, second)
