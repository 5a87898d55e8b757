"""Criteria that look at batches, against NumPy on outputs seen by own hooks and finite differences."""

import copy
import itertools
import logging
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from saliency import SALIENCY
from torch import nn

from repr_det import RePrScheme, UserError, find_filter_layers
from repr_det.method.criteria import CRITERIA, Context, get_criterion
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import random_state

DATA_CRITERIA = ["apoz", *SALIENCY]
STEP = 1e-5


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


def make(norm: str, seed: int = 0) -> tuple[Net, TrainingPasses]:
    """A net in float64 and passes over batches of 3 images of 3 x 6 x 6; the dropout mask is the same in every pass."""
    torch.manual_seed(seed)
    net = Net(norm).double()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    generator = torch.Generator().manual_seed(seed + 1)
    data = [
        (torch.randn(3, 3, 6, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2])) for _ in range(4)
    ]

    def loss(batch):
        torch.manual_seed(5)
        return F.cross_entropy(net(batch[0]), batch[1])

    return net, TrainingPasses(net, lambda number, cycle: data[cycle : cycle + number], loss)


def layers_of(net: Net):
    return find_filter_layers(net, ["*"])


def scores_of(name: str, net: Net, passes: TrainingPasses, num_batches: int = 2) -> dict[str, np.ndarray]:
    context = Context(torch.Generator(), passes, num_batches, cycle=1)
    with torch.no_grad():  # as RePrScheme.drop calls it
        found = get_criterion(SALIENCY.get(name, name)).score(layers_of(net), context)
    return {layer: score.numpy() for layer, score in found.items()}


def outputs(net: Net, passes: TrainingPasses) -> dict[str, list[np.ndarray]]:
    """Layer name -> its outputs after conv and norm, (N, J, P) a call, on the batches of cycle 1."""
    twin = copy.deepcopy(net).train()
    seen: dict[str, list[np.ndarray]] = {}
    for name, layer in zip([x.name for x in layers_of(net)], layers_of(twin), strict=True):
        module = layer.conv if name != "conv3.0" else twin.conv3[1]
        module.register_forward_hook(
            lambda _, __, out, name=name: seen.setdefault(name, []).append(out.detach().numpy().copy())
        )
    for x, _ in passes.batches(2, 1):
        torch.manual_seed(5)
        twin(x)
    return {name: [out.reshape(*out.shape[:2], -1) for out in outs] for name, outs in seen.items()}


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
@pytest.mark.parametrize("name", ["mean_activation", "apoz"])
def test_outputs_after_the_relu(norm, name):
    net, passes = make(norm)
    found = scores_of(name, net, passes)
    seen = outputs(net, passes)
    assert set(seen) == {"conv1", "conv2", "conv3.0", "twice"} and len(seen["twice"]) == 4 and len(seen["conv1"]) == 2
    for layer, outs in seen.items():
        values = np.concatenate([out.transpose(1, 0, 2).reshape(out.shape[1], -1) for out in outs], 1)
        relu = np.maximum(values, 0)
        expected = -relu.mean(1) if name == "mean_activation" else (relu == 0).mean(1)
        np.testing.assert_allclose(found[layer], expected, rtol=1e-5, atol=1e-7)
    assert (found["never"] == 0).all()


def slope(net: Net, passes: TrainingPasses, batch, change) -> float:
    """Central difference of the loss when ``change(step)`` -> undo changes the net."""
    values = []
    for step in (STEP, -STEP):
        undo = change(step)
        with torch.no_grad():
            values.append(passes.loss(batch).item())
        undo()
    return (values[0] - values[1]) / (2 * STEP)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_taylor_is_the_slope_of_the_loss_when_the_output_is_scaled(norm):
    net, passes = make(norm)
    found = scores_of("taylor", net, passes, num_batches=1)
    (batch,) = passes.batches(1, 1)
    positions = {"conv1": 36, "conv2": 36, "conv3.0": 36, "twice": 36 + 9}
    net.train()
    for layer in layers_of(net):
        if layer.name == "never":
            continue
        expected = np.zeros((3, layer.num_filters))
        for image, channel in itertools.product(range(3), range(layer.num_filters)):

            def change(step, layer=layer, image=image, channel=channel):
                def scale(_, __, out):
                    scaled = out.clone()
                    scaled[image, channel] += step * out[image, channel].clamp_min(0)
                    return scaled

                return layer.output_module().register_forward_hook(scale).remove

            expected[image, channel] = slope(net, passes, batch, change) / positions[layer.name]
        np.testing.assert_allclose(found[layer.name], -np.abs(expected).mean(0), rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_gradient_and_hessian_against_finite_differences(norm):
    net, passes = make(norm)
    gradient, hessian = (scores_of(name, net, passes) for name in ("gradient", "hessian"))
    net.train()
    for layer in [x for x in layers_of(net) if x.name in ("conv2", "conv3.0")]:
        size, fisher = np.zeros(layer.num_filters), np.zeros(layer.num_filters)
        for batch in passes.batches(2, 1):
            for key, tensor in layer.tensors().items():
                if not tensor.requires_grad:
                    continue
                flat = tensor.detach().view(layer.num_filters, -1)
                for row, column in itertools.product(*map(range, flat.shape)):

                    def change(step, flat=flat, row=row, column=column):
                        value = flat[row, column].item()
                        flat[row, column] = value + step
                        return lambda: flat[row, column].fill_(value)

                    g = slope(net, passes, batch, change)
                    fisher[row] += 0.5 * g**2 * flat[row, column].item() ** 2 / 2
                    size[row] += abs(g) / flat.shape[1] / 2 if key == "weight" else 0
        np.testing.assert_allclose(gradient[layer.name], -size, rtol=2e-4, atol=1e-8)
        np.testing.assert_allclose(hessian[layer.name], -fisher, rtol=2e-4, atol=1e-10)


@pytest.mark.parametrize("name", DATA_CRITERIA)
def test_leaves_no_trace(name):
    net, passes = make("BN")
    net.eval()
    net.conv2.train()
    passes.loss(passes.batches(1, 0)[0]).backward()
    before = copy.deepcopy(net.state_dict())
    gradients = {n: None if p.grad is None else (p.grad, p.grad.clone()) for n, p in net.named_parameters()}
    modes, state = [m.training for m in net.modules()], random_state()
    hooks = [len(m._forward_hooks) for m in net.modules()]
    scores_of(name, net, passes)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for n, p in net.named_parameters():
        assert (p.grad is None) == (gradients[n] is None)
        if p.grad is not None:
            assert p.grad is gradients[n][0] and torch.equal(p.grad, gradients[n][1])
    assert modes == [m.training for m in net.modules()] and hooks == [len(m._forward_hooks) for m in net.modules()]
    after = random_state()
    assert str(after) == str(state) and torch.equal(after["torch"], state["torch"])


@pytest.mark.parametrize("name", DATA_CRITERIA)
def test_a_layer_that_never_runs_is_named(name, caplog):
    net, passes = make("")
    with caplog.at_level(logging.WARNING):
        found = scores_of(name, net, passes)
    assert (found["never"] == 0).all() and "never took no part" in caplog.text


@pytest.mark.parametrize("name", DATA_CRITERIA)
def test_scores_are_finite_where_a_filter_is_not(name):
    net, passes = make("")
    with torch.no_grad():
        net.conv1.weight[2] = float("nan")
    assert all(np.isfinite(score).all() for score in scores_of(name, net, passes).values())


@pytest.mark.parametrize("name", sorted(n for n in CRITERIA if CRITERIA[n].needs_data))
def test_without_batches_a_criterion_says_so(name):
    net, _ = make("")
    with pytest.raises(UserError, match=f"^criterion= '{name}' looks at training batches"):
        RePrScheme(layers_of(net), torch.optim.SGD(net.parameters(), 0.1), criterion=name)
    with pytest.raises(UserError, match=f"criterion '{name}' looks at training batches"):
        get_criterion(name).score(layers_of(net), Context(torch.Generator()))


@pytest.mark.parametrize("name", [*DATA_CRITERIA, "redundant"])
def test_a_drop_by_it_changes_nothing_but_the_dropped_rows(name):
    net, passes = make("BN")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    layers = find_filter_layers(net, ["*"], ["never"])
    scheme = RePrScheme(layers, optimizer, criterion=SALIENCY.get(name, name), passes=passes, criterion_batches=2)
    before, state = copy.deepcopy(net.state_dict()), random_state()
    dropped = scheme.drop().dropped
    assert str(random_state()) == str(state) and all(p.grad is None for p in net.parameters())
    assert sum(map(len, dropped.values())) == int(0.3 * 16) or name == "redundant"
    rows = {t.data_ptr(): scheme.masks[x.name] for x in scheme.layers for t in x.tensors().values()}
    for key, tensor in net.state_dict(keep_vars=True).items():
        mask = rows.get(tensor.data_ptr())
        same = (tensor == before[key]) | (False if mask is None else mask.view(-1, *[1] * (tensor.dim() - 1)))
        assert same.all(), key


RANKS = """
import sys, torch, torch.distributed as dist, torch.nn as nn
from repr_det import find_filter_layers
from repr_det.method.criteria import Context, get_criterion
from saliency import SALIENCY
from repr_det.method.passes import TrainingPasses
rank, port, out, names = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.ReLU())
data = [torch.randn(2, 2, 8, 8) for _ in range(2)]
def scores(cycle):
    passes = TrainingPasses(net, lambda n, c: [data[c]], lambda x: net(x).square().mean())
    context = Context(torch.Generator(), passes, 1, cycle)
    return {n: get_criterion(SALIENCY.get(n, n)).score(find_filter_layers(net, ["*"]), context) for n in names}
alone = [scores(0), scores(1)]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.save((alone, scores(rank)), out)
dist.destroy_process_group()
"""


def test_two_ranks_get_the_mean_of_their_scores(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    files = [str(tmp_path / f"{rank}.pt") for rank in range(2)]
    names = DATA_CRITERIA
    command = [sys.executable, "-c", RANKS]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen([*command, str(r), port, file, *names], env=env) for r, file in enumerate(files)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    (alone, first), (_, second) = (torch.load(file, weights_only=True) for file in files)
    for name in names:
        for layer, score in first[name].items():
            assert torch.equal(score, second[name][layer])
            torch.testing.assert_close(score, (alone[0][name][layer] + alone[1][name][layer]) / 2)
