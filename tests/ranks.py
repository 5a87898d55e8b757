"""What each of two processes of a plain loop does in test_ranks.py: ranks that would choose differently."""

import os
import sys
from pathlib import Path

if "SIMULATED_CUDA_DEVICES" in os.environ and __name__ == "__main__":
    import simulated_cuda.plugin  # noqa: F401  (before torch)
    from simulated_cuda import nccl

    nccl.install()

import pytest
import torch
import torch.distributed as dist
from saliency import SALIENCY
from torch import nn

from repr_det import RePrScheme, find_filter_layers
from repr_det.method.criteria import Context, get_criterion
from repr_det.method.passes import TrainingPasses

CRITERIA = ["apoz", *SALIENCY]


class Net(nn.Module):
    """A conv that predicts on rank 1 alone, and one with a norm whose statistics do not move."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.third, self.last = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 2, 1)
        self.trained, self.rank = nn.BatchNorm2d(16), rank
        self.norm.requires_grad_(False)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        x = self.trained(self.second(self.norm(self.first(x)).relu())).relu()
        x = self.third(x)
        out = self.last(x.relu()).mean()
        return out + 0.01 * x.square().mean() if self.rank else out


def main(rank: str, folder: str, backend: str) -> None:
    """Keeps what it has found. The current device stays the first one; the weights are not contiguous."""
    number, place = int(rank), Path(folder)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", number)
    net = Net(number).to(device).to(memory_format=torch.channels_last).train()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number)).to(device)
    passes = TrainingPasses(net, lambda number, cycle: [images], net)

    def scores() -> dict[str, dict[str, torch.Tensor]]:
        context, layers = Context(torch.Generator(), passes, 1), find_filter_layers(net, ["*"])
        return {name: get_criterion(SALIENCY.get(name, name)).score(layers, context) for name in CRITERIA}

    found = {"alone": scores()}
    dist.init_process_group(backend, init_method=f"file://{place}/store", rank=number, world_size=2)
    found["together"] = scores()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05, momentum=0.9)
    layers = find_filter_layers(net, ["*"], ["last"])
    scheme = RePrScheme(layers, optimizer, model=net, passes=passes, criterion="random", seed=number)

    def values() -> dict[str, torch.Tensor]:
        own = ("trained.running_mean", "trained.running_var")  # of BN, which each rank has for itself
        return {name: part.cpu().clone() for name, part in net.state_dict().items() if name not in own}

    def step() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        net(images).backward()
        for parameter in [p for p in net.parameters() if p.grad is not None]:
            gradient = parameter.grad.contiguous()
            dist.all_reduce(gradient)
            parameter.grad.copy_(gradient / 2)
        optimizer.step()
        scheme.check()
        return values()

    def refused(transition) -> str:
        """The error where rank 1 has another weight, which is put right again."""
        net.first.weight.data.mul_(1 + number)
        with pytest.raises(RuntimeError) as error:
            transition()
        net.first.weight.data.div_(1 + number)
        return str(error.value)

    found["before"] = step()
    found["layers"] = [layer.name for layer in scheme.participants.agreed()]
    found["refused"] = [refused(scheme.drop)]
    found["dropped"] = scheme.drop().dropped
    step()
    found["refused"].append(refused(scheme.restore))
    found["restored"] = scheme.restore().dropped
    found["after"] = values()
    found["end"] = step()
    torch.save(found, place / f"{rank}.pth")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
