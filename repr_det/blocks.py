"""Residual blocks whose forward pass is known, so that RePr can tell which conv reads the channels of which."""

from collections.abc import Iterator
from typing import Any

from torch import nn

try:
    from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
except ImportError:  # a plain PyTorch loop needs no Detectron2
    _CHAINS: dict[Any, tuple[str, ...]] = {}
else:
    # These convs in this order with a ReLU between, plus the shortcut, ReLU.
    _CHAINS = {BasicBlock.forward: ("conv1", "conv2"), BottleneckBlock.forward: ("conv1", "conv2", "conv3")}


def known_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every block with Detectron2's own forward pass, and its convs in the order in which they run."""
    for block in model.modules():
        names = _CHAINS.get(type(block).forward)
        if names is not None and "forward" not in block.__dict__:
            yield block, [getattr(block, name) for name in names]


def readers(model: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """Conv of a known block -> the only conv that reads its channels; None where they are added to the shortcut."""
    return {
        conv: reader for _, chain in known_blocks(model) for conv, reader in zip(chain, [*chain[1:], None], strict=True)
    }
