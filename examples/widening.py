#!/usr/bin/env python
"""A trained network is widened by copies of its filters (Net2Net), and RePr makes them filters of their own."""

import logging

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from repr_det import RePr

pixels, classes = load_digits(return_X_y=True)
images, classes = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)


def network(width: int) -> nn.Sequential:
    convs = [layer for channels in (1, width) for layer in (nn.Conv2d(channels, width, 3), nn.ReLU())]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(16 * width, 10))


@torch.no_grad()
def widened(narrow: nn.Sequential, times: int) -> nn.Sequential:
    """The same function: the weights that read a filter are divided among its copies."""
    wide = network(times * narrow[0].out_channels)
    for place in (0, 2, 5):
        source, layer = narrow[place], wide[place]
        rows, inputs = len(layer.weight) // len(source.weight), layer.weight.shape[1] // source.weight.shape[1]
        layer.weight.copy_(source.weight.repeat(rows, inputs, *[1] * (source.weight.dim() - 2)) / inputs)
        layer.bias.copy_(source.bias.repeat(rows))
    return wide


def train(model: nn.Sequential, steps: int, with_repr: bool = False) -> None:
    def loss(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(images[rows]), classes[rows])

    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    if with_repr:
        cycles = {"s1_iters": steps // 40, "s2_iters": steps // 80}  # three, early and short
        data = {"loader": list(torch.arange(1000).split(50)), "loss": loss}
        repr_training = RePr(model, optimizer, steps, criterion="redundant", max_drop_per_layer=0.75, **cycles, **data)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(1000, (50,))).backward()
        optimizer.step()
        if with_repr:
            repr_training.step()
    print(f"test accuracy {100 * (model(images[1000:]).argmax(1) == classes[1000:]).float().mean():.1f} %")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    small = network(8)
    train(small, 400)
    train(widened(small, 4), 400, with_repr=True)
