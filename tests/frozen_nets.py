"""Small nets with FrozenBN for the tests of its calibration, and how their training batches are run."""

from contextlib import ExitStack

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

    def norm_of(self, name: str) -> nn.Module:
        return getattr(self, name).norm

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


def passes_of(net: nn.Module, log: list | None = None) -> TrainingPasses:
    def draw(number, cycle):
        if log is not None:
            log.append((number, cycle))
        return batches(number, cycle)

    return TrainingPasses(net, draw, lambda batch: net(batch).square().mean())


def output_statistics(net: nn.Module, images: torch.Tensor, of: str = "norm") -> dict[str, tuple]:
    """Layer -> mean and standard deviation of each channel after the norm (or of its input), in float64."""
    seen = {}
    with torch.no_grad(), ExitStack() as stack:
        for name in LAYERS:

            def record(module, inputs, output, name=name):
                seen[name] = (output if of == "norm" else inputs[0]).double().numpy().copy()

            stack.callback(net.norm_of(name).register_forward_hook(record).remove)
        net(images)
    return {name: (x.mean((0, 2, 3)), x.std((0, 2, 3))) for name, x in seen.items()}


def fuse(net: nn.Module, images: torch.Tensor, seed: int) -> None:
    """Buffers as in the official MSRA weights: mean 0, variance 1, weight gamma / sigma, bias beta - mu weight."""
    rng = np.random.default_rng(seed)
    for name in LAYERS:
        norm = net.norm_of(name)
        norm.running_mean.zero_(), norm.running_var.fill_(1)
        mu, sigma = output_statistics(net, images, of="input")[name]
        gamma, beta = rng.uniform(0.2, 1.5, len(mu)) * rng.choice([-1, 1], len(mu)), rng.normal(0, 1, len(mu))
        norm.weight.copy_(torch.tensor(gamma / sigma))
        norm.bias.copy_(torch.tensor(beta - mu * gamma / sigma))


def make(model=InsideNet, fused: bool = True, log: list | None = None, **options):
    torch.manual_seed(0)
    net = model()
    images = torch.cat(batches(4, 0))
    if fused:
        fuse(net, images, seed=1)
    else:
        for name in LAYERS:
            norm = net.norm_of(name)
            norm.running_mean.normal_(0, 1), norm.running_var.uniform_(0.5, 3)
            norm.weight.uniform_(0.3, 2), norm.bias.normal_(0, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)
    options = {"criterion": "random", "drop_ratio": 0.4, "calibration_batches": 4, **options}
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), optimizer, passes=passes_of(net, log), **options)
    return net, optimizer, scheme, images


def train(net, optimizer, count: int) -> None:
    for batch in batches(count, 5):
        optimizer.zero_grad()
        F.cross_entropy(net(batch), torch.tensor([0, 3])).backward()
        optimizer.step()


def buffers(net: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {k: getattr(net.norm_of(name), k).clone() for k in ("weight", "bias", "running_mean", "running_var")}
        for name in LAYERS
    }


def masks_of(scheme: RePrScheme) -> dict[str, np.ndarray]:
    return {name: mask.numpy().copy() for name, mask in scheme.masks.items()}


def assert_same_moments(after, before, masks):
    """Mean and standard deviation of the masked channels of every layer."""
    for name in LAYERS:
        for found, wanted in zip(after[name], before[name], strict=True):
            np.testing.assert_allclose(found[masks[name]], wanted[masks[name]], rtol=1e-4, atol=1e-5)
