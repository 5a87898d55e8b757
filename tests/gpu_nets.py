"""A small net for the tests of GPUs, with what they may treat differently, and its batches on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

NORMS = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "GN": lambda channels: nn.GroupNorm(4, channels)}
_generator = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(4, 3, 10, 10, generator=_generator), torch.randint(5, (4,), generator=_generator)) for _ in range(4)
]


class Net(nn.Module):
    """A stem, a residual block, a grouped conv and one of 1 x 1."""

    def __init__(self, norm: str = "BN") -> None:
        super().__init__()
        torch.manual_seed(0)
        make = NORMS[norm]
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), make(16)
        self.block = BasicBlock(16, 16, norm_layer=make)
        self.conv2, self.norm2 = nn.Conv2d(16, 24, 3, groups=2), make(24)
        self.conv3, self.norm3 = nn.Conv2d(24, 40, 1), make(40)
        self.head = nn.Linear(40, 5)

    def forward(self, images: Tensor) -> Tensor:
        value = self.block(F.relu(self.norm1(self.conv1(images))))
        value = F.relu(self.norm2(self.conv2(value)))
        value = F.relu(self.norm3(self.conv3(value)))
        return self.head(value.mean((2, 3)))


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, classes = batch
    device = next(net.parameters()).device
    return F.cross_entropy(net(images.to(device)).float(), classes.to(device))
