"""A control for the fine-tuning search: a backbone in which it is known what there is to remove."""

from itertools import pairwise

import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn


@torch.no_grad()
def plant_copies(model: nn.Module, share: float) -> int:
    """Makes a share of the filters of every trainable conv1 and conv2 of the residual blocks copies of the others.

    A copy has the weight and the norm of its origin, and they share the weights that read the origin (Net2WiderNet,
    arXiv 1511.05641, without noise). So the network computes what it would with the origins alone, and descent does not
    part a copy from its origin. What is added to a shortcut (the last conv of a block) stays.

    Args:
        model: with Detectron2's residual blocks.
        share: of the filters of each conv, the last ones.

    Returns:
        How many filters are copies now.
    """
    planted = 0
    for block in model.modules():
        if not isinstance(block, (BasicBlock, BottleneckBlock)):
            continue
        convs = [module for name, module in block.named_children() if name.startswith("conv")]
        for conv, reader in pairwise(convs):
            if not conv.weight.requires_grad:
                continue
            filters = len(conv.weight)
            origins = filters - int(share * filters)
            origin = torch.arange(filters) % origins
            reader.weight.copy_(reader.weight[:, origin] / origin.bincount()[origin, None, None])
            for values in [conv.weight, *conv.norm.parameters(), *conv.norm.buffers()]:
                if values.dim():  # not BN's count of batches
                    values.copy_(values[origin])
            planted += filters - origins
    return planted
