"""What one of several ranks, each on a device of its own, does in test_gpu_devices.py."""

import os
import sys
from pathlib import Path

if "SIMULATED_CUDA_DEVICES" in os.environ:
    import simulated_cuda.plugin  # noqa: F401  (before torch)
    from simulated_cuda import nccl

    nccl.install()

import torch
import torch.distributed as dist
from gpu_nets import BATCHES, Net, loss_of

from repr_det import RePr

CASES = [("BN", "ortho"), ("FrozenBN", "apoz"), ("GN", "redundant")]
STEPS = 12


def main(rank: int, world: int, folder: Path, backends: list[str]) -> None:
    """Trains by the same schedule under every backend, and keeps masks and weights."""
    for number, backend in enumerate(backends):
        dist.init_process_group(backend, init_method=f"file://{folder}/{number}", rank=rank, world_size=world)
        cases = CASES if number == 0 else CASES[:1]
        found = {f"{norm} {criterion}": train(rank, world, norm, criterion) for norm, criterion in cases}
        torch.save(found, folder / f"{number} {rank}.pth")
        dist.destroy_process_group()


def train(rank: int, world: int, norm: str, criterion: str) -> dict[str, dict]:
    """The current device stays the first one, as where nobody has set it."""
    device = torch.device("cuda", rank)
    net = Net(norm).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    own = [(images.to(device), classes.to(device)) for images, classes in BATCHES[rank::world]]
    options = {"criterion": criterion, "loader": own, "loss": lambda batch: loss_of(net, batch)}
    training = RePr(net, optimizer, STEPS, num_cycles=1, criterion_batches=2, calibration_batches=2, **options)
    masks: dict = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, own[step % len(own)]).backward()
        for parameter in net.parameters():
            gradient = parameter.grad.contiguous()
            dist.all_reduce(gradient)
            parameter.grad.copy_(gradient / world)
        optimizer.step()
        training.step()
        masks = dict(training.scheme.masks) or masks
    assert training.scheme.cycle == 1
    return {"masks": masks, "weights": {name: value.cpu() for name, value in net.named_parameters()}}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
