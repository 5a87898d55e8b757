"""C3(32), the paper's vanilla network: three convs of 32 filters, each with ReLU and max-pooling, a linear classifier.

The paper leaves the rest open. "3x3" is the common reading: 3x3 filters, 2x2 pooling. "5x5" is what the author's code
builds (iamaaditya/repr-ortho): 5x5 filters, 3x3 pooling of stride 2, weights from a truncated normal distribution of
standard deviation 0.04, biases 0. Neither has a norm. "narrow" is "3x3" with 8 filters a conv, to be widened later.
"teacher" is a larger network with BN to distil from.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import nn

NETWORKS = ("3x3", "5x5")
NARROW = "narrow"
TEACHER = "teacher"
_CLASSES = 10


def build(kind: str = "3x3", dropout: float = 0.0) -> nn.Sequential:
    """A network with new weights from torch's global generator: (N, 3, 32, 32) -> (N, 10), channels_last.

    Args:
        kind: one of NETWORKS, NARROW or TEACHER.
        dropout: probability for the inputs of the classifier; 0 for none.
    """
    if kind == TEACHER:
        return _teacher(dropout).to(memory_format=torch.channels_last)
    released = kind == "5x5"
    kernel = 5 if released else 3
    filters = 8 if kind == NARROW else 32
    modules: list[nn.Module] = []
    for channels in (3, filters, filters):
        # ceil_mode pads 3x3 windows at the far edge only, as TensorFlow's "SAME". ReLU after pooling is the same
        # function as before it, on a quarter of the values.
        pool = nn.MaxPool2d(3, 2, ceil_mode=True) if released else nn.MaxPool2d(2)
        modules += [nn.Conv2d(channels, filters, kernel, padding=kernel // 2), pool, nn.ReLU(inplace=True)]
    model = nn.Sequential(*modules, nn.Flatten(), nn.Dropout(dropout), nn.Linear(filters * 4 * 4, _CLASSES))
    if released:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.04, a=-0.08, b=0.08)
            else:
                nn.init.zeros_(parameter)
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def plant(model: nn.Sequential, duplicates: float = 0.0, dead: float = 0.0) -> None:
    """Makes filters of every conv of C3(32) redundant, as a control: what is there to remove is known.

    Args:
        duplicates: share of the filters that become copies of the first ones, weight and bias, and share with them the
            weights that read them (Net2WiderNet, arXiv 1511.05641, without noise). The network computes what it would
            without the copies, and their gradients are those of what they copy: descent does not part them.
        dead: share of the filters, the last ones, whose bias is so low that no ReLU behind them is ever above 0. They
            get no gradient.
    """
    layers = [module for module in model if isinstance(module, (nn.Conv2d, nn.Linear))]
    for conv, reader in pairwise(layers):
        filters = len(conv.weight)
        first = filters - int(duplicates * filters)
        origin = torch.arange(filters) % first
        # (rows, filters, taps), where a linear layer has a tap for each place of the map
        taps = reader.weight.reshape(len(reader.weight), filters, -1)
        taps = taps[:, origin] / origin.bincount()[origin, None]
        reader.weight.copy_(taps.reshape(reader.weight.shape))
        conv.weight.copy_(conv.weight[origin])
        conv.bias.copy_(conv.bias[origin])
        conv.bias[filters - int(dead * filters) :] = -1e3


def convs(model: nn.Module) -> Iterable[nn.Conv2d]:
    return (module for module in model.modules() if isinstance(module, nn.Conv2d))


def _teacher(dropout: float) -> nn.Sequential:
    """Five 3x3 convs of 48 to 192 filters with BN: 44 million multiplications an image, C3(32) has 4."""

    def block(channels: int, filters: int, *more: nn.Module) -> list[nn.Module]:
        conv = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(filters), *more, nn.ReLU(inplace=True)]

    pool = nn.MaxPool2d(2)
    blocks = [*block(3, 48, pool), *block(48, 96), *block(96, 96, pool), *block(96, 192, pool), *block(192, 192)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(dropout), nn.Linear(192 * 4 * 4, _CLASSES))
