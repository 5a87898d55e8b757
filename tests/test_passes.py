"""Passes over training batches leave no trace, and state that no ``state_dict`` holds is found and carried along."""

import copy
import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_weights
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from frozen_nets import make
from torch import nn
from torch.utils.data import DataLoader

from repr_det.detectron.passes import training_passes
from repr_det.method.passes import passes_over
from repr_det.network.state import HiddenState, undisturbed


def draw_from_everything() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()


def seed_everything() -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    random.gauss(0, 1), np.random.randn()  # both keep a second value for the next call


class NoisyNet(nn.Module):
    """BN, dropout, a part in evaluation mode, and averages kept in every way that people do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.evaluated = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
        self.drop = nn.Dropout(0.5)
        self.steps, self.rate, self.warm = 0, 0.5, False
        self.mean, self.late = torch.zeros(3), None
        self.register_buffer("loud", torch.zeros(1), persistent=False)

    def forward(self, x):
        draw_from_everything()
        self.activation = self.conv(x)  # belongs to a graph: a cache, no state
        self.steps += 1
        self.warm = True
        self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        self.late = self.mean.sum()
        self.loud = self.loud + 1
        DenseDetector._ema_update(self, "loss_normalizer", float(x.abs().sum()), 100)  # what RetinaNet and FCOS do
        return self.drop(self.evaluated(self.bn(self.activation))).square().mean()

    def hidden(self) -> tuple:
        values = self.steps, self.warm, self.mean.tolist(), self.late, self.loud.item()
        return *values, getattr(self, "loss_normalizer", None)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("passes_before", [0, 2])
def test_undisturbed_puts_everything_back(fails, passes_before):
    seed_everything()
    net = NoisyNet()
    for _ in range(passes_before):
        net(torch.randn(2, 3, 6, 6)).backward()
        net.conv.bias.grad = None
    net.bn.eval()
    before, hidden, mean = copy.deepcopy(net.state_dict()), net.hidden(), net.mean
    gradients = [(parameter, parameter.grad, copy.deepcopy(parameter.grad)) for parameter in net.parameters()]
    modes = [module.training for module in net.modules()]
    seed_everything()
    expected = draw_from_everything()
    seed_everything()
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), undisturbed(net):
        assert all(module.training for module in net.modules())
        assert all(parameter.grad is None for parameter in net.parameters())
        net(torch.randn(2, 3, 6, 6)).backward()
        assert not torch.equal(net.bn.running_mean, before["bn.running_mean"])
        assert net.hidden() != hidden
        if fails:
            raise KeyboardInterrupt
    assert draw_from_everything() == expected
    assert_same_weights(net.state_dict(), before)
    for parameter, gradient, value in gradients:
        assert parameter.grad is gradient and (value is None or torch.equal(gradient, value))
    assert [module.training for module in net.modules()] == modes
    assert net.hidden() == hidden and net.mean is mean
    assert hasattr(net, "activation") is (passes_before > 0)


def test_hidden_state_is_carried_to_a_new_model(tmp_path):
    net = nn.Sequential(NoisyNet())
    hidden = HiddenState(net)
    assert hidden.changed() == {}
    for _ in range(3):
        net(torch.randn(2, 3, 4, 4))
    torch.save(hidden.changed(), tmp_path / "state.pth")
    saved = torch.load(tmp_path / "state.pth", weights_only=True)
    assert set(saved) == {"0:steps", "0:warm", "0:mean", "0:late", "0:loud", "0:loss_normalizer"}  # not 0:rate
    other = nn.Sequential(NoisyNet())
    resumed = HiddenState(other)
    assert resumed.load(saved) == []
    assert other[0].hidden() == net[0].hidden()
    assert resumed.changed().keys() == saved.keys()  # the next checkpoint holds it too
    assert HiddenState(nn.Linear(1, 1)).load(saved) == sorted(saved, key=list(saved).index)


def test_buffers_that_come_into_being_are_put_back():
    net = nn.Module()
    for name, value in (("none", None), ("replaced", torch.zeros(1)), ("resized", torch.zeros(1))):
        net.register_buffer(name, value)
    before, values = dict(net._buffers), copy.deepcopy(net._buffers)
    with undisturbed(net):
        net.none = net.replaced = torch.ones(3)
        net.resized.resize_(3).fill_(1)
        net.register_buffer("registered", torch.ones(3))
    assert net._buffers == values and all(net._buffers[name] is before[name] for name in before)


class Noisy(torch.utils.data.Dataset):
    """With generators of its own, in an object of its own."""

    def __init__(self) -> None:
        self.rng, self.own = np.random.default_rng(0), random.Random(1)
        self.augment = [torch.Generator().manual_seed(2), {"legacy": np.random.RandomState(3)}]

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index):
        drawn = self.rng.normal() + self.own.random() + self.augment[1]["legacy"].rand()
        return torch.tensor([index, drawn + torch.rand(1, generator=self.augment[0]).item()])


@pytest.mark.parametrize("mapped", [False, True], ids=["data set", "closure"])
@pytest.mark.parametrize("own_generator", [False, True])
def test_passes_leave_loader_and_data_set_of_the_training_alone(own_generator, mapped):
    def epoch(with_passes):
        seed_everything()
        data, generator = Noisy(), torch.Generator().manual_seed(6) if own_generator else None
        collate = (lambda batch: torch.stack([data[index] for index in batch])) if mapped else None
        source = range(16) if mapped else data
        loader = DataLoader(source, 4, shuffle=True, generator=generator, collate_fn=collate)
        passes = passes_over(nn.ReLU(), loader, sum, seed=3)

        def images_of(cycle):
            return [batch[:, 0].tolist() for batch in passes.batches(2, cycle)]

        seen = []
        for batch in loader:
            seen.append(batch.tolist())
            if with_passes and len(seen) in (1, 3):
                assert images_of(0) == images_of(0) != images_of(1)
        return seen, draw_from_everything()

    assert epoch(True) == epoch(False)


@pytest.mark.parametrize("by_hook", [False, True])
def test_passes_have_buckets_of_their_own(by_hook):
    """Detectron2's grouping by shape keeps the images that wait for others from one iterator to the next."""

    def epoch(with_passes):
        loader = AspectRatioGroupedDataset([dict(n=n, width=1 + n % 3, height=2) for n in range(40)], 2)
        trainer = SimpleNamespace(data_loader=loader)
        passes = training_passes(nn.ReLU(), trainer, 3, None) if by_hook else passes_over(nn.ReLU(), loader, sum)
        seen = []
        for batch in loader:
            seen.append([image["n"] for image in batch])
            if with_passes:
                assert next(iter(passes.batches(1, 0)))[0]["n"] == 0
        return seen

    assert epoch(True) == epoch(False)


def test_no_hook_stays_where_a_pass_fails():
    net, _, scheme, _ = make()

    def fail(batch):
        net.conv1(batch)
        raise RuntimeError("out of memory")

    scheme.passes.loss = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        scheme.drop()
    assert not scheme.is_sub and not any(x._forward_hooks or x._forward_pre_hooks for x in net.modules())
