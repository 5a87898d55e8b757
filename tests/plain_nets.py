"""Small nets in plain PyTorch for the tests of faults in a user's training loop."""

import torch
import torch.nn.functional as F
from torch import nn

from repr_det import RePrScheme, find_filter_layers

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plain_net(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=bias),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=bias),
        nn.BatchNorm2d(16),
    )


def readable_net(bias: bool = False) -> nn.Sequential:
    """The same, and a conv that reads what it puts out: by a traced pass "0" and "3" take part."""
    return nn.Sequential(*plain_net(bias), nn.ReLU(), nn.Conv2d(16, 16, 1))


def plain_scheme(net: nn.Module | None = None, optimizer=None, **options):
    net = plain_net() if net is None else net
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    return net, optimizer, RePrScheme(find_filter_layers(net, ["*"]), optimizer, **options)


def in_sub_network(net=None, optimizer=None, before: int = 3, during: int = 0, **options):
    """The same after some steps, the drop and some steps of the sub-network; and the masks, which stay."""
    net, optimizer, scheme = plain_scheme(net, optimizer, **options)
    train(net, optimizer, steps=before)
    scheme.check()
    scheme.drop()
    train(net, optimizer, steps=during)
    assert largest_dropped(scheme) == 0
    return net, optimizer, scheme, {name: mask.clone() for name, mask in scheme.masks.items()}


def loss_of(net: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    return F.mse_loss(net(images), images.mean(1, keepdim=True).expand(-1, 16, -1, -1))


def train(net: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(net).backward()
        for optimizer in optimizers:
            optimizer.step()


def largest_dropped(scheme: RePrScheme) -> float:
    """The largest entry of a dropped filter's tensors."""
    return max(
        tensor[scheme.masks[layer.name]].abs().max().item()
        for layer in scheme.layers
        if scheme.masks[layer.name].any()
        for tensor in layer.tensors().values()
    )
