"""The oracle of examples/criteria.py against copies of a network whose channels are switched off by hooks."""

import copy

import digits
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from criteria import ablation, oracle
from scipy.stats import rankdata
from torch import nn

from repr_det import RePr, find_filter_layers
from repr_det.method.criteria import Context, get_criterion
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import random_state


def made(norm: str = "BN") -> tuple[nn.Sequential, TrainingPasses]:
    """A network with dropout in float64, and passes over batches of 3 images; the generator runs on."""
    torch.manual_seed(0)
    first, second = (nn.BatchNorm2d(5), nn.BatchNorm2d(3)) if norm == "BN" else (nn.Identity(), nn.Identity())
    convs = nn.Conv2d(2, 5, 3), first, nn.ReLU(), nn.Conv2d(5, 3, 3), second, nn.ReLU()
    net = nn.Sequential(*convs, nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 3)).double()
    for module in (first, second) if norm == "BN" else ():
        nn.init.normal_(module.bias, 0, 0.3)
    images = torch.randn(4, 3, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = [(image, torch.arange(3)) for image in images]

    def loss(batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    return net, TrainingPasses(net, lambda number, cycle: data[cycle : cycle + number], loss)


def loss_without(net: nn.Sequential, batches, name: str, channel: int, state) -> float:
    """The mean loss of a copy whose removed channel (-1: none) is 0 behind the norm."""
    twin = copy.deepcopy(net).train()
    keep = torch.arange(net[int(name)].out_channels) != channel
    twin[int(name) + 1].register_forward_hook(lambda _, __, out: out * keep.view(1, -1, 1, 1))
    torch.set_rng_state(state)
    return float(np.mean([F.cross_entropy(twin(x), y).item() for x, y in batches]))


@pytest.mark.parametrize("norm", ["BN", ""])
def test_ablation_is_the_increase_of_the_loss_and_leaves_no_trace(norm):
    net, passes = made(norm)
    layers, batches = find_filter_layers(net, ["*"]), passes.batches(2, 1)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    noted = str(random_state())
    increase = {layer.name: ablation(layer, passes, batches) for layer in layers}
    scores = get_criterion(oracle).score(layers, Context(torch.Generator(), passes, 2, 1))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert str(random_state()) == noted
    for layer in layers:
        whole = loss_without(net, batches, layer.name, -1, state)
        expected = [loss_without(net, batches, layer.name, i, state) - whole for i in range(layer.num_filters)]
        np.testing.assert_allclose(increase[layer.name].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(scores[layer.name].numpy(), np.negative(expected), atol=1e-12)


def test_correlation_is_spearmans():
    model, (_, held_out, _) = digits.c3_32(), digits.digits(500)
    found = digits.correlations(model, held_out, seed=3)
    passes, layers = digits.passes_over(model, held_out), find_filter_layers(model, ["*"])
    harm = np.concatenate([ablation(layer, passes, passes.batches(8, 0)) for layer in layers])
    norms = np.concatenate([layer.weight.detach().flatten(1).square().mean(1).numpy() for layer in layers])
    assert found["weight_norm"] == pytest.approx(-np.corrcoef(rankdata(norms), rankdata(-harm))[0, 1], abs=1e-6)
    assert "taylor" in found


def test_a_drop_by_the_oracle():
    net, passes = made("")
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    repr_training = RePr(net, optimizer, 9, layers=["0"], criterion=oracle, passes=passes, num_cycles=1)
    expected = ablation(find_filter_layers(net, ["0"])[0], passes, passes.batches(8, 0)).argmin()
    passes.loss(passes.batches(1, 0)[0]).backward()
    assert repr_training.scheme.drop().dropped == {"0": [int(expected)]}
