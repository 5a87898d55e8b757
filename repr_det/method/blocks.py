"""Forward passes that RePr knows: which conv of a residual block reads the channels of which, and which convs and norms
treat every channel by itself.

A framework registers its own: ``detectron.blocks`` those of Detectron2. Of torchvision's ResNets only the order of the
convs is known, where they are in use.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

# Forward function of a block class -> its convs in the order in which they run, a ReLU between; then the shortcut is
# added, then a ReLU.
_CHAINS: dict[Callable, tuple[str, ...]] = {}
# Convs that compute F.conv2d, then their attributes ``norm`` and ``activation`` where they have them.
CONV_FORWARDS: list[Callable] = [nn.Conv2d.forward]
# Norms that find everything about a channel in its entries of weight, bias, running_mean and running_var.
NORM_FORWARDS: list[Callable] = [nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward]


def register_block(block: type[nn.Module], convs: Sequence[str]) -> None:
    """Makes a class of residual blocks known.

    Args:
        block: its forward pass is ``relu(conv_n(relu(... conv_1(x))) + shortcut(x))``, with an attribute ``shortcut``
            that is None for the identity.
        convs: names of its attributes conv_1 to conv_n, in the order in which they run.
    """
    _CHAINS[block.forward] = tuple(convs)


def known_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every block whose class is registered and whose forward pass is its class's, with its convs in order."""
    return _blocks_of(model, _CHAINS)


def readers(model: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """Conv of a known block -> the only conv that reads its channels, through norm and ReLU; None where they are added
    to the shortcut. Missing where another module than a conv stands there, or one whose weight is re-parametrised."""
    chains = [chain for _, chain in known_blocks(model)] + _torchvision_chains(model)
    pairs = (pair for chain in chains for pair in zip(chain, [*chain[1:], None], strict=True))
    return {conv: reader for conv, reader in pairs if reader is None or _is_plain(reader)}


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and isinstance(module._parameters.get("weight"), nn.Parameter)


def _torchvision_chains(model: nn.Module) -> list[list[nn.Module]]:
    resnet = sys.modules.get("torchvision.models.resnet")
    if resnet is None:
        return []
    chains = {resnet.BasicBlock.forward: ("conv1", "conv2"), resnet.Bottleneck.forward: ("conv1", "conv2", "conv3")}
    return [chain for block, chain in _blocks_of(model, chains) if isinstance(block.relu, nn.ReLU)]


def _blocks_of(
    model: nn.Module, chains: Mapping[Callable, tuple[str, ...]]
) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    for block in model.modules():
        names = chains.get(type(block).forward)
        if names is not None and "forward" not in block.__dict__:
            yield block, [getattr(block, name) for name in names]
