"""Small nets with FrozenBN for the tests of its calibration, and how their training batches are run."""

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from repr_det import RePrScheme, find_filter_layers
from repr_det.method.passes import TrainingPasses

WIDTH = 16
LAYERS = ("conv1", "conv2", "conv3")


class InsideNet(nn.Module):
    """Norms inside the convs (Detectron2): conv1 - ReLU - conv2 - ReLU - conv3 + shortcut - classifier."""

    def __init__(self, norm=FrozenBatchNorm2d) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, WIDTH, 3, padding=1, bias=False, norm=norm(WIDTH))
        self.conv2 = Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False, norm=norm(WIDTH))
        self.conv3 = Conv2d(WIDTH, 2 * WIDTH, 1, bias=False, norm=norm(2 * WIDTH))
        self.shortcut = nn.Conv2d(3, 2 * WIDTH, 1)
        self.classifier = nn.Linear(2 * WIDTH, 4)

    def norms(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name).norm for name in LAYERS}

    def forward(self, x):
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = F.relu_(self.conv3(out) + self.shortcut(x))
        return self.classifier(out.mean((2, 3)))


def batches(number: int, cycle: int) -> list[torch.Tensor]:
    """Images of 10 x 12 px whose channels differ in mean and size."""
    generator = torch.Generator().manual_seed(1000 * cycle + number)
    scale, shift = torch.tensor([1.0, 3.0, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, -2.0, 0.1]).view(1, 3, 1, 1)
    return [torch.randn(2, 3, 10, 12, generator=generator) * scale + shift for _ in range(number)]


def passes_of(net: nn.Module, log: list) -> TrainingPasses:
    def draw(number, cycle):
        log.append((number, cycle))
        return batches(number, cycle)

    return TrainingPasses(net, draw, lambda batch: net(batch).square().mean())


@torch.no_grad()
def moments_of(net: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer -> mean and standard deviation of each channel after the norm, (2, J) in float64."""
    seen, handles = {}, []
    for name, norm in net.norms().items():

        def record(module, inputs, output, name=name):
            output = output.double()
            seen[name] = torch.stack([output.mean((0, 2, 3)), output.std((0, 2, 3), correction=0)])

        handles.append(norm.register_forward_hook(record))
    net(images)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def fuse(net: nn.Module, images: torch.Tensor) -> None:
    """Buffers as in the official MSRA weights: mean 0, variance 1, weight gamma / sigma, bias beta - mu weight."""
    rng = np.random.default_rng(1)
    for name, norm in net.norms().items():
        norm.running_mean.zero_(), norm.running_var.fill_(1)
        norm.weight.fill_(1), norm.bias.zero_()
        mu, sigma = moments_of(net, images)[name]
        gamma = torch.tensor(rng.uniform(0.2, 1.5, len(mu)) * rng.choice([-1, 1], len(mu)))
        norm.weight.copy_(gamma / sigma)
        norm.bias.copy_(torch.tensor(rng.normal(0, 1, len(mu))) - mu * gamma / sigma)


def make(model=InsideNet, fused: bool = True, log: list | None = None, traced: bool = False, **options):
    """Net, optimizer, scheme and the images of cycle 0; ``traced``: a training step shows the scheme its model."""
    torch.manual_seed(0)
    net = model()
    images = torch.cat(batches(4, 0))
    if fused:
        fuse(net, images)
    else:
        for norm in net.norms().values():
            norm.running_mean.normal_(0, 1), norm.running_var.uniform_(0.5, 3)
            norm.weight.uniform_(0.3, 2), norm.bias.normal_(0, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)
    passes = passes_of(net, [] if log is None else log)
    options = {"criterion": "random", "drop_ratio": 0.4, "calibration_batches": 4, "passes": passes, **options}
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), optimizer, model=net if traced else None, **options)
    if traced:
        train(net, optimizer, 1)
        scheme.check()
    return net, optimizer, scheme, images


def train(net, optimizer, count: int) -> None:
    for batch in batches(count, 5):
        optimizer.zero_grad()
        F.cross_entropy(net(batch), torch.tensor([0, 3])).backward()
        optimizer.step()
