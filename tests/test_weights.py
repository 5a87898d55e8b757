"""Weights of other programs are loaded whole, or refused; those of a sub-network are recognised."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from repr_det import UserError
from repr_det.runs.checkpoints import AtomicCheckpointer, zero_filters


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": {f"module.{k}": v for k, v in w.items()}}])
def test_plain_and_ddp_weights(tmp_path, wrap):
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    AtomicCheckpointer(model).load(str(tmp_path / "weights.pth"))
    assert torch.equal(model.weight, source.weight) and torch.equal(model.bias, source.bias)


def test_weights_of_which_none_fits_are_refused(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"not hold any weight of this model: weight is missing .* or rename its w"):
        AtomicCheckpointer(nn.Linear(2, 2)).load(str(tmp_path / "weights.pth"))


def conv_and_norm(rows=(), norm=()):
    net = nn.Sequential()
    net.conv = nn.Conv2d(3, 6, 3, bias=False)
    net.conv.norm = nn.BatchNorm2d(6)
    nn.init.normal_(net.conv.norm.bias)
    for tensor, zeros in ((net.conv.weight, rows), (net.conv.norm.weight, norm), (net.conv.norm.bias, norm)):
        tensor.data[list(zeros)] = 0
    return net.state_dict()


@pytest.mark.parametrize(
    ("rows", "norm", "expected"),
    [
        ((), (), {}),
        ((1, 4), (1, 4), {"conv": [1, 4]}),
        ((1, 4), (4,), {"conv": [4]}),
        ((), range(6), {}),  # zero_init_residual
        (range(6), range(6), {}),  # begins so, as deformable offsets do
    ],
)
def test_which_filters_are_switched_off(rows, norm, expected):
    weights = conv_and_norm(rows, norm)
    assert zero_filters(weights) == zero_filters({k: v.numpy() for k, v in weights.items()}) == expected
