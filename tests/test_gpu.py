"""What a GPU has to show (``pytest -m gpu`` runs these and those of test_amp.py); two cases are the CPU's too."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import GPU, ROOT, assert_same_weights
from small_loop import OPTIONS, TwoConvs, batch

from repr_det import RePr
from repr_det.method.orthogonality import inter_filter_orthogonality, least_overlap_filters

TWO_GPUS = [
    *GPU,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif("SIMULATED_CUDA_DEVICES" in os.environ, reason="DistributedDataParallel needs NCCL itself"),
]


def on_gpu(test):
    for mark in GPU:
        test = mark(test)
    return test


@on_gpu
def test_metric_and_new_filters_are_those_of_the_cpu():
    """512 x 512 x 3 x 3: the largest 3x3 layer of R50."""
    weight = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inter_filter_orthogonality(weight.cuda()), inter_filter_orthogonality(weight))
    kept, dropped = weight[:358], weight[358:]
    new = least_overlap_filters(kept.cuda(), dropped.cuda(), torch.Generator().manual_seed(1))
    assert new.is_cuda
    assert torch.equal(new.cpu(), least_overlap_filters(kept, dropped, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_same_masks_and_filters_for_one_seed(device):
    """Of equal weights, whatever device they are on; on the CPU it is compared with itself."""
    found = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        model = TwoConvs().to(place)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        repr_training = RePr(model, optimizer, 8, **OPTIONS, sample=batch(0).to(place))
        dropped = repr_training.scheme.drop().dropped
        repr_training.scheme.restore()
        found.append((dropped, {name: value.cpu() for name, value in model.named_parameters()}))
    assert found[0][0] == found[1][0] and sum(map(len, found[0][0].values())) == 7
    assert_same_weights(found[0][1], found[1][1])


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
