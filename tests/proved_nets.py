"""Networks of which a traced pass says which convs can lose filters, with what it says."""

import collections
import dataclasses
import types

import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import Conv2d as Detectron2Conv2d
from detectron2.layers import get_norm
from torch import nn
from torch.nn.utils import parametrizations, prune
from traced_nets import Net, build, calling, conv

BN = nn.BatchNorm2d


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, 2 * self.weight, self.bias)


class Frozen(nn.Module):
    """FrozenBN of nobody's library, which does not tell its eps; ``shape`` is that of its buffers."""

    def __init__(self, *shape, bias=True) -> None:
        super().__init__()
        for key, value in (("weight", 0.7), ("bias", 0.2), ("running_mean", 0.1), ("running_var", 2.0)):
            if bias or key != "bias":
                self.register_buffer(key, torch.full(shape, value))

    def forward(self, x):
        gain = self.weight / (self.running_var + 1e-3).sqrt()
        shift = getattr(self, "bias", 0) - self.running_mean * gain
        return x * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def two_convs(join, channels=16) -> Net:
    """Two convs, and a norm with what ``join`` makes of them."""

    def run(net, x):
        return net.last(net.norm(join(net.a(x), net.b(x))).relu())

    return Net(run, a=conv(), b=conv(), norm=BN(channels), last=nn.Conv2d(channels, 8, 1))


def shuffled(x):
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def logging(net, x):
    x = net.a(x).relu()
    net.seen = net.a.weight.norm().item()
    return net.b(x)


def predicting(how) -> Net:
    """A backbone, and heads as detectors have them; ``how`` they give back what they predict."""

    def run(net, x):
        x = net.body(x).relu()
        return how(net, net.boxes(x), net.scores(x))

    return Net(run, body=conv(), boxes=conv(16), scores=conv(16))


GRID = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
BLUR = torch.full((16, 1, 3, 3), 1 / 9)


@dataclasses.dataclass(slots=True)
class Boxes:
    boxes: torch.Tensor


@dataclasses.dataclass(slots=True)
class Found(Boxes):
    scores: object


class Listed(list):
    """A list with an attribute."""


def listed(_, boxes, scores):
    found = Listed([boxes])
    found.scores = collections.deque([types.MappingProxyType({"scores": scores})])
    return found


def kept_aside(net, boxes, scores):
    net.seen = {"boxes": [boxes]}
    return scores


def sharing(first, second, key) -> nn.Module:
    net = build(conv(), BN(16), nn.ReLU(), conv(16), BN(16), nn.ReLU())
    setattr(net[second], key, getattr(net[first], key))
    return net


def sharing_convs() -> nn.Module:
    net = build(conv(), nn.ReLU(), conv(16), nn.ReLU(), conv(16), nn.ReLU())
    net[4].weight = net[2].weight
    return net


# What makes it; conv -> norm of those that take part; conv -> what is said of those that do not.
NETS = {
    "a sum in front of a norm": (lambda: two_convs(lambda a, b: a + b), {}, {"a": "", "b": ""}),
    "shuffled": (lambda: two_convs(lambda a, b: shuffled(torch.cat([a, b], 1)), 32), {}, {"a": "", "b": ""}),
    "a norm for two": (
        lambda: Net(
            lambda net, x: net.c(net.norm(net.b(net.norm(net.a(x)).relu())).relu()),
            a=conv(), norm=BN(16), b=conv(16), c=conv(16),
        ),
        {}, dict.fromkeys("ab", "its norm norm is that of others too"),
    ),
    "past its norm": (
        lambda: build(conv(), Net(lambda net, x: net.norm(x).relu() + x, norm=BN(16))),
        {}, {"0": "goes into a norm and elsewhere"},
    ),
    "a log": (lambda: Net(logging, a=conv(), b=conv(16)), {"a": None}, {"b": "it predicts"}),
    "a bias outside": (
        lambda: build(conv(), Net(lambda net, x: x + net.own.bias.view(-1, 1, 1), own=BN(16))),
        {}, {"0": "behind it comes add"},
    ),
    # A dropped filter of the gate would be a gate of one half.
    "gated": (
        lambda: build(conv(), BN(16), nn.SiLU(), torchvision.ops.SqueezeExcitation(16, 8)),
        {"0": "1", "3.fc1": None}, {"3.fc2": "sigmoid"},
    ),
    "over a pyramid": (
        lambda: Net(
            lambda net, x: [net.scores(net.norm(net.head(x[..., ::step])).relu()) for step in (1, 2)],
            head=conv(), norm=nn.GroupNorm(8, 16), scores=conv(16, 4),
        ),
        {"head": "norm"}, {"scores": "it predicts"},
    ),
    "a dict in a dataclass with slots": (
        lambda: predicting(lambda net, boxes, scores: Found(boxes.flatten(2), {"b": [scores.permute(0, 2, 3, 1)]})),
        {"body": None}, dict.fromkeys(["boxes", "scores"], "it predicts"),
    ),
    "a mapping in a queue in an attribute of a list": (
        lambda: predicting(listed), {"body": None}, dict.fromkeys(["boxes", "scores"], "it predicts"),
    ),
    "an output in an attribute": (lambda: predicting(kept_aside), {"body": None}, {"boxes": "it predicts"}),
    "key points": (  # the centre of mass of each map
        lambda: predicting(lambda _, a, b: [a.relu().flatten(2) @ GRID, torch.einsum("nchw,hk->nckw", b, GRID[:8])]),
        {"body": None}, dict.fromkeys(["boxes", "scores"], "it predicts"),
    ),
    "pooled and blurred": (
        lambda: predicting(lambda _, a, b: [F.linear(a.flatten(2), GRID.T), F.conv2d(b, BLUR, groups=16)]),
        {"body": None}, dict.fromkeys(["boxes", "scores"], "it predicts"),
    ),
    "attention": (
        lambda: Net(
            lambda net, x: net.out((net.v(x).flatten(2) @ net.q(x).flatten(2).softmax(1).mT).unflatten(2, (8, 8))),
            q=conv(filters=64), v=conv(), out=conv(16, 4),
        ),
        {"v": None}, {"out": "it predicts"},
    ),
    "mixed over positions, with a bias": (
        lambda: build(conv(), nn.ReLU(), nn.Flatten(2), nn.Linear(64, 64), nn.Unflatten(2, (8, 8))),
        {}, {"0": "behind it comes addmm"},
    ),
    "losses": (
        lambda: predicting(lambda _, a, b: F.mse_loss(a, torch.ones_like(a)) + b.square().mean()),
        {"body": None}, {"boxes": "", "scores": ""},
    ),
    "deformable": (
        lambda: build(conv(), nn.ReLU(), Net(
            lambda net, x: net.deformed(x, net.offsets(x)),
            offsets=conv(16, 18), deformed=torchvision.ops.DeformConv2d(16, 16, 3, padding=1),
        )),
        {"0": None}, {"2.offsets": "it tells deform_conv2d where to look"},
    ),
    "the largest of several channels": (
        lambda: build(conv(), BN(16), calling(lambda x: x.amax(1, keepdim=True))), {}, {"0": "behind it comes amax"}
    ),
    "a difference": (
        lambda: Net(
            lambda net, x: net.last(net.a(x).sigmoid() - net.b(x).exp()), a=conv(), b=conv(), last=conv(16)
        ),
        {}, {"a": "sigmoid", "b": "exp"},
    ),
    "a norm of every image": (
        lambda: build(conv(), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), nn.ChannelShuffle(4)), {"0": "1"}, {}
    ),
    "a norm without a weight": (
        lambda: build(conv(), nn.Conv2d(16, 16, 1, groups=16), nn.GroupNorm(8, 16, affine=False)),
        {}, {"1": "which is no norm of its own with a weight"},
    ),
    "a norm of images": (lambda: build(conv(), Frozen(1, 16, 1, 1)), {}, {"0": "behind it comes add"}),
    "LN of Detectron2": (lambda: build(Detectron2Conv2d(3, 16, 3, norm=get_norm("LN", 16))), {}, {"0": ""}),
    "Detectron2's activation": (lambda: build(Detectron2Conv2d(3, 16, 3, activation=F.gelu)), {"0": None}, {}),
    "sigmoid inside": (lambda: build(Detectron2Conv2d(3, 16, 3, activation=torch.sigmoid)), {}, {"0": "sigmoid"}),
    "a scaled weight": (lambda: build(Scaled(3, 16, 3), BN(16)), {}, {"0": "its weight goes through mul"}),
    "pruning": (lambda: build(prune.random_unstructured(conv(), "weight", 0.5), BN(16)), {}, {"0": "weight"}),
    "weight norm": (lambda: build(parametrizations.weight_norm(conv()), BN(16)), {}, {"0": "weight"}),
    "a weight for two": (sharing_convs, {"0": None}, {"2": "4 computes with its weight too"}),
    "a bias for two": (lambda: sharing(0, 3, "bias"), {}, {"0": "3 computes with 0.bias too"}),
    "a beta for two": (lambda: sharing(1, 4, "bias"), {}, {"0": "4 computes with 1.bias too"}),
}  # fmt: skip
# Refused by rule, though these rows are silent: they are when others of their kind are not.
CAUTIOUS = {"a norm without a weight", "a weight for two"}
