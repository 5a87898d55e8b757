"""What one of two gloo processes of a plain loop does in test_ranks.py: ranks that would choose differently."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from repr_det import RePrScheme, find_filter_layers
from repr_det.method.distributed import broadcast_, mean_over_ranks
from repr_det.method.passes import TrainingPasses


class Net(nn.Module):
    """A conv that predicts on rank 1 alone, and one with a norm whose statistics do not move."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.third, self.last = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 2, 1)
        self.rank = rank
        self.norm.requires_grad_(False)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        x = self.third(self.second(self.norm(self.first(x)).relu()).relu())
        out = self.last(x.relu()).mean()
        return out + 0.01 * x.square().mean() if self.rank else out


def main(rank: int, port: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net = Net(rank).train()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05, momentum=0.9)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    passes = TrainingPasses(net, lambda number, cycle: [images], lambda batch: net(batch))
    layers = find_filter_layers(net, ["*"], ["last"])
    scheme = RePrScheme(layers, optimizer, model=net, passes=passes, criterion="random", seed=rank)

    def step() -> None:
        optimizer.zero_grad()
        model(images).backward()
        optimizer.step()
        scheme.check()

    step()
    alone = {name: part.clone() for name, part in net.state_dict().items()}
    dropped = scheme.drop().dropped
    step()
    told = scheme.restore()
    net_after = {name: part.clone() for name, part in net.state_dict().items()}
    step()
    flags = torch.tensor([rank == 0, True])
    broadcast_([flags], flags.device)
    found = {
        "layers": [layer.name for layer in scheme.layers],
        "before": alone,
        "dropped": dropped,
        "restored": told.dropped,
        "after": net_after,
        "end": net.state_dict(),
        "flags": flags,
        "mean": mean_over_ranks(torch.tensor([float(rank), 3.0])),
    }
    torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
