"""Training state that no ``state_dict`` holds: found, carried by a checkpoint, put back after extra passes."""

import pytest
import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from repr_det.network.hidden_state import HiddenState
from repr_det.network.state import undisturbed


class Averaging(nn.Module):
    """Keeps averages in every way that people do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.steps, self.rate, self.warm = 0, 0.5, False
        self.mean = torch.zeros(3)
        self.late = None
        self.register_buffer("loud", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.activation = self.conv(x)  # belongs to a graph: a cache, no state
        self.steps += 1
        self.warm = True
        self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        self.late = self.mean.sum()
        self.loud = self.loud + 1
        DenseDetector._ema_update(self, "loss_normalizer", float(x.abs().sum()), 100)  # what RetinaNet and FCOS do
        return self.activation.square().mean()


def attributes_of(net):
    return net.steps, net.warm, net.mean.tolist(), net.late, net.loud.item(), getattr(net, "loss_normalizer", None)


def test_what_changed_is_carried_to_a_new_model(tmp_path):
    net = nn.Sequential(Averaging())
    hidden = HiddenState(net)
    assert hidden.changed() == {}
    for _ in range(3):
        net(torch.randn(2, 3, 4, 4))
    torch.save(hidden.changed(), tmp_path / "state.pth")
    saved = torch.load(tmp_path / "state.pth", weights_only=True)
    assert set(saved) == {"0:steps", "0:warm", "0:mean", "0:late", "0:loud", "0:loss_normalizer"}  # not 0:rate
    other = nn.Sequential(Averaging())
    resumed = HiddenState(other)
    assert resumed.load(saved) == []
    assert attributes_of(other[0]) == attributes_of(net[0])
    assert resumed.changed().keys() == saved.keys()  # the next checkpoint holds it too
    assert HiddenState(nn.Linear(1, 1)).load(saved) == sorted(saved, key=list(saved).index)


@pytest.mark.parametrize("passes_before", [0, 2])
def test_undisturbed_puts_it_back(passes_before):
    net = Averaging()
    for _ in range(passes_before):
        net(torch.randn(2, 3, 4, 4))
    before, mean = attributes_of(net), net.mean
    with undisturbed(net):
        net(torch.randn(2, 3, 4, 4))
        assert attributes_of(net) != before
    assert attributes_of(net) == before and net.mean is mean
    assert hasattr(net, "activation") is (passes_before > 0)
