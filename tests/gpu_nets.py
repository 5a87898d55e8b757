"""A small net for the tests of GPUs, with what they may treat differently, its batches on the CPU, and its loop."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

from repr_det import RePr

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


class Loop:
    """A training loop of ``Net`` with RePr, in some precision."""

    def __init__(self, net, dtype=torch.float32, autocast=None, scaler=None, rate=0.05, **options) -> None:
        self.net, self.autocast = net.to(dtype), autocast
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
        options = {"num_cycles": 2, "criterion_batches": 2, "calibration_batches": 2, **options}
        self.batches = [(images.to(dtype), classes) for images, classes in BATCHES]
        self.training = RePr(net, self.optimizer, 24, loader=self.batches, loss=self.loss, **options)
        self.iteration = 0

    def loss(self, batch):
        with torch.autocast("cuda", self.autocast, enabled=self.autocast is not None):
            return loss_of(self.net, batch)

    def step(self):
        """The transition, and whether the optimizer has stepped."""
        self.optimizer.zero_grad()
        weight = next(self.net.parameters())
        before = weight.detach().clone()
        self.scaler.scale(self.loss(self.batches[self.iteration % len(self.batches)])).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.iteration += 1
        stepped = not torch.equal(before, weight)
        done = self.training.step()
        self.assert_dropped_are_zero()
        return done, stepped

    def assert_dropped_are_zero(self) -> None:
        for layer in self.training.scheme.layers if self.training.phase == "sub" else ():
            states = [self.optimizer.state.get(parameter, {}) for parameter in layer.parameters()]
            tensors = [*layer.tensors().values(), *(state["momentum_buffer"] for state in states if state)]
            assert not any(tensor.cpu()[self.training.scheme.masks[layer.name]].any() for tensor in tensors)

    def assert_two_cycles(self) -> None:
        assert self.training.scheme.cycle == 2
        assert all(value.isfinite().all() for value in self.net.state_dict().values())


def trained(net: nn.Module, **options) -> Loop:
    loop = Loop(net, **options)
    for _ in range(24):
        loop.step()
    loop.assert_two_cycles()
    return loop


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Counts how often the host waits for a device inside, by line or by torch's warning; complete at the end."""
    found: Counter[str] = Counter()
    simulated = sys.modules.get("simulated_cuda.device")
    if simulated is not None:
        before = simulated.waits.copy()
        yield found
        found.update(simulated.waits - before)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(str(warning.message) for warning in caught if "synchroniz" in str(warning.message))
