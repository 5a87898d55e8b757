"""Criteria that look at batches, against NumPy on outputs seen by own hooks and finite differences."""

import copy
import itertools

import digits
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from criteria import ablation, oracle
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from ranks import CRITERIA as DATA_CRITERIA
from saliency import SALIENCY
from scipy.stats import rankdata
from torch import nn

from repr_det import find_filter_layers
from repr_det.method.criteria import Context, get_criterion, gradients_of
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import random_state

STEP = 1e-5
RUN = ("conv1", "conv2", "conv3.0", "twice")


class Net(nn.Module):
    """What bites: ReLUs and sums in place, a norm inside the conv, one that runs twice a pass, one that never runs."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, 5, 3, padding=1, bias=norm == "", norm=get_norm(norm, 5))
        self.conv2 = Conv2d(5, 3, 3, padding=1, bias=norm == "", norm=get_norm(norm, 3))
        self.conv3 = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.never = nn.Conv2d(4, 2, 1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        out = F.relu_(self.conv1(x))
        out = self.conv2(out)
        out += x
        out = self.conv3(F.relu_(out))
        fine = F.relu_(self.twice(out)).mean((2, 3))
        coarse = F.relu_(self.twice(F.max_pool2d(out, 2))).mean((2, 3))
        return self.classifier(self.dropout(fine + coarse))


def make(norm: str) -> tuple[Net, TrainingPasses]:
    """A net in float64 and passes over batches of 3 images of 3 x 6 x 6; the dropout mask is the same in every pass."""
    torch.manual_seed(0)
    net = Net(norm).double()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    images = torch.randn(4, 3, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(batch):
        torch.manual_seed(5)
        return F.cross_entropy(net(batch), torch.tensor([0, 1, 2]))

    return net, TrainingPasses(net, lambda number, cycle: list(images[cycle : cycle + number]), loss)


def state_of(net: Net) -> tuple:
    """Modes, hooks, random states, weights, statistics and the gradients that wait."""
    modes = [(module.training, len(module._forward_hooks)) for module in net.modules()]
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    tensors = [torch.get_rng_state(), *net.state_dict().values(), *gradients]
    return modes, str(random_state()), [tensor.numpy().tobytes() for tensor in tensors]


def scores_of(name, net: Net, passes: TrainingPasses, num_batches: int = 2) -> dict[str, np.ndarray]:
    """They leave no trace."""
    context = Context(torch.Generator(), passes, num_batches, cycle=1)
    net.eval()
    net.conv2.train()
    passes.loss(passes.batches(1, 0)[0]).backward()
    before = state_of(net)
    with torch.no_grad():  # as RePrScheme.drop calls it
        found = get_criterion(SALIENCY.get(name, name)).score(find_filter_layers(net, ["*"]), context)
    assert state_of(net) == before
    return {layer: score.numpy() for layer, score in found.items()}


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_outputs_after_the_relu(norm):
    net, passes = make(norm)
    found = {name: scores_of(name, net, passes) for name in ("mean_activation", "apoz")}
    twin, seen = copy.deepcopy(net).train(), {name: [] for name in RUN}
    for module, outs in zip((twin.conv1, twin.conv2, twin.conv3[1], twin.twice), seen.values(), strict=True):
        module.register_forward_hook(lambda _, __, out, outs=outs: outs.append(out.detach().numpy().copy()))
    for batch in passes.batches(2, 1):
        twin(batch)
    assert len(seen["twice"]) == 4 and len(seen["conv1"]) == 2
    for layer, outs in seen.items():
        relu = np.concatenate([np.maximum(out, 0).transpose(1, 0, 2, 3).reshape(out.shape[1], -1) for out in outs], 1)
        np.testing.assert_allclose(found["mean_activation"][layer], -relu.mean(1), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found["apoz"][layer], (relu == 0).mean(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_taylor_is_the_slope_of_the_loss_when_the_output_is_scaled(norm):
    net, passes = make(norm)
    found = scores_of("taylor", net, passes, num_batches=1)
    (batch,) = passes.batches(1, 1)
    net.train()
    for layer in find_filter_layers(net, RUN):
        expected = np.zeros((3, layer.num_filters))
        for image, channel, step in itertools.product(range(3), range(layer.num_filters), (STEP, -STEP)):

            def scale(_, __, out, image=image, channel=channel, step=step):
                scaled = out.clone()
                scaled[image, channel] += step * out[image, channel].clamp_min(0)
                return scaled

            handle = layer.output_module().register_forward_hook(scale)
            with torch.no_grad():  # a central difference
                expected[image, channel] += passes.loss(batch).item() / (2 * step)
            handle.remove()
        expected /= 36 + 9 * (layer.name == "twice")
        np.testing.assert_allclose(found[layer.name], -np.abs(expected).mean(0), rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_gradient_and_hessian_are_those_of_a_backward_pass(norm):
    net, passes = make(norm)
    gradient, hessian = (scores_of(name, net, passes) for name in ("gradient", "hessian"))
    net.train()
    for layer in find_filter_layers(net, RUN):
        size, fisher = np.zeros(layer.num_filters), np.zeros(layer.num_filters)
        trained = {key: tensor for key, tensor in layer.tensors().items() if tensor.requires_grad}
        for batch in passes.batches(2, 1):
            net.zero_grad()
            passes.loss(batch).backward()
            for key, tensor in trained.items():
                g, flat = (part.detach().reshape(len(tensor), -1).numpy() for part in (tensor.grad, tensor))
                fisher += ((g * flat) ** 2).sum(1) / 4
                size += np.abs(g).mean(1) / 2 if key == "weight" else 0
        np.testing.assert_allclose(gradient[layer.name], -size, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(hessian[layer.name], -fisher, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", [*DATA_CRITERIA, "redundant"])
def test_a_layer_that_never_runs_is_named_and_scores_are_finite_where_a_filter_is_not(name, caplog):
    """Also where the weight of another layer is frozen."""
    net, passes = make("")
    net.twice.weight.requires_grad_(False)
    with torch.no_grad():
        net.conv1.weight[2] = float("nan")
    found = scores_of(name, net, passes)
    assert not any(np.isnan(score).any() for score in found.values())
    if name != "redundant":
        assert (found["never"] == 0).all() and "never did not run" in caplog.text


def test_without_batches_a_criterion_says_so():
    score, layers = get_criterion("redundant").score, find_filter_layers(make("")[0], ["*"])
    assert "this criterion looks at training batches" in refused(score, layers, Context(torch.Generator()))


@pytest.mark.parametrize("norm", ["BN", ""])
def test_the_oracle_of_the_examples_is_the_increase_of_the_loss(norm):
    """Against copies of the network whose channels are switched off by hooks; the dropout mask is drawn anew."""
    net, seeded = make(norm)
    passes = TrainingPasses(net, seeded.batches, lambda batch: F.cross_entropy(net(batch), torch.tensor([0, 1, 2])))
    found, state = scores_of(oracle, net, passes), torch.get_rng_state()

    def loss_without(name: str, channel: int) -> float:
        twin = copy.deepcopy(net)
        conv = twin.get_submodule(name)
        twin.train()
        keep = torch.arange(conv.out_channels) != channel
        behind = twin.conv3[1] if name == "conv3.0" else conv
        behind.register_forward_hook(lambda _, __, out: out * keep.view(1, -1, 1, 1))
        torch.set_rng_state(state)
        return np.mean([F.cross_entropy(twin(batch), torch.tensor([0, 1, 2])).item() for batch in passes.batches(2, 1)])

    for name, scores in found.items():
        expected = [loss_without(name, -1) - loss_without(name, i) for i in range(len(scores))]
        np.testing.assert_allclose(scores, expected, atol=1e-12)


def test_correlation_is_spearmans():
    model, (_, held_out, _) = digits.c3_32(), digits.digits(500)
    found = digits.correlations(model, held_out, seed=3)
    passes, layers = digits.passes_over(model, held_out), find_filter_layers(model, ["*"])
    harm = np.concatenate([ablation(layer, passes, passes.batches(8, 0)) for layer in layers])
    norms = np.concatenate([layer.weight.detach().flatten(1).square().mean(1).numpy() for layer in layers])
    assert found["weight_norm"] == pytest.approx(-np.corrcoef(rankdata(norms), rankdata(-harm))[0, 1], abs=1e-6)
    assert "taylor" in found


def test_gradients_of_what_is_frozen_or_has_no_part_are_missing():
    trained, frozen, apart = (torch.ones(2, requires_grad=grad) for grad in (True, False, True))
    found = gradients_of((trained * frozen).sum(), [frozen, trained, apart])
    assert found[0] is found[2] is None and torch.equal(found[1], frozen)
    assert gradients_of(trained.sum(), [frozen]) == [None]
