"""A traced pass of small networks, and the same question asked by hand: is a filter silent whose rows are zero?"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from repr_det.method.layers import find_filter_layers
from repr_det.network.proof import Verdict
from repr_det.network.tracing import tensors_in
from repr_det.network.watch import Watch

ROWS = [2, 3]  # one group of a GroupNorm of two channels a group
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Readers(TorchFunctionMode):
    """Keeps what convolutions and matrix products get, as Python calls them: input and weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.conv2d, F.linear, torch.matmul, torch.Tensor.matmul):
            self.calls.append((args[0].detach().clone(), args[1]))
        return function(*args, **(kwargs or {}))


class Net(nn.Module):
    """Modules by name, and what a forward pass does with them."""

    def __init__(self, run, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def calling(function) -> Net:
    return Net(lambda _, x: function(x))


def conv(inputs=3, filters=16) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, 3, padding=1)


def build(*modules: nn.Module) -> nn.Sequential:
    """The modules, a conv of as many channels as it gets, and a classifier; all norms with an affine of their own."""
    torch.manual_seed(0)
    body = nn.Sequential(*modules)
    channels = body(IMAGES).shape[1]
    net = nn.Sequential(*modules, nn.Conv2d(channels, 16, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
    net(IMAGES)
    return vary_norms(net)


@torch.no_grad()
def vary_norms(net: nn.Module) -> nn.Module:
    """A norm of weight 1 and bias 0 hides what it adds."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if parameter.dim() == 1 and not isinstance(net.get_submodule(name.rpartition(".")[0]), nn.Conv2d):
            parameter.uniform_(0.3, 1.5, generator=generator)
    return net


def verdicts(net: nn.Module, run=None) -> dict[str, Verdict]:
    """The verdicts of the first pass, by conv."""
    watch = Watch(net, [layer.name for layer in find_filter_layers(net, ["*"])])
    (run or (lambda: net(IMAGES)))()
    watch.update()
    watch.close()
    return watch.current()


def told(found) -> dict[str, tuple[str, str | None]]:
    return {name: (verdict.reason, verdict.norm) for name, verdict in found.items()}


def is_silent(net: nn.Module, conv: str, norm: str | None, run=lambda net: net(IMAGES)) -> bool:
    """True if filters ROWS of a conv are silent where their rows of conv and norm are zero: the conv computes with its
    own weight, what reads them gets 0 where it got something else before, and they are not in the output."""
    before, output, _ = _seen(net, run)
    zeroed = copy.deepcopy(net)
    with torch.no_grad():
        for name in (conv, norm):
            for key in ("weight", "bias") if name is not None else ():
                tensor = getattr(zeroed.get_submodule(name), key, None)
                if tensor is not None:
                    tensor[ROWS] = 0
    after, left, weights = _seen(zeroed, run)
    if not any(weight is zeroed.get_submodule(conv).weight for weight in weights):
        return False
    read = [_is_zero_now(*pair) for pair in zip(before, after, strict=True)]
    outputs = [_is_zero_now(*pair) for pair in zip(tensors_in(output), tensors_in(left), strict=True)]
    return True in read and False not in read and outputs == [None] * len(outputs)


def _is_zero_now(before: torch.Tensor, after: torch.Tensor) -> bool | None:
    """True if the channels that changed are 0 everywhere; None if all have changed, or none."""
    changed = (before != after).transpose(0, 1).flatten(1).any(1) if before.dim() > 1 else torch.zeros(1)
    return not after[:, changed].any() if 0 < changed.float().mean() < 0.5 else None


def _seen(net, run):
    torch.manual_seed(3)  # of dropout
    with torch.no_grad(), Readers() as readers:
        output = run(net)
    return [values for values, _ in readers.calls], output, [weight for _, weight in readers.calls]
