"""RePrScheme over norm x optimizer against a network without the dropped channels (invariants 1, 2 and 3)."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from textbook import textbook_overlap, unit_rows
from torch import nn

from repr_det import RePrScheme, UserError, find_filter_layers

NORMS = ["BN", "SyncBN", "naiveSyncBN", "FrozenBN", "GN", ""]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, foreach=True),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "clipped sgd": lambda p: Clipped(p, 0.05, momentum=0.9),
}
WIDTH, GROUPS = 32, 8  # a filter of conv2 has 36 dimensions: few for 32 filters, many for the 4 of a group


class ResidualNet(nn.Module):
    """conv1 - ReLU - conv2 (grouped) + shortcut - ReLU - conv3 (bias) - classifier: a channel with and one without a
    ReLU of its own before it is added to something."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        norms = [nn.GroupNorm(WIDTH // 2, WIDTH) if norm == "GN" else get_norm(norm, WIDTH) for _ in range(2)]
        self.shortcut = Conv2d(3, WIDTH, 1, bias=False)
        self.conv1 = Conv2d(3, WIDTH, 3, padding=1, bias=norm == "", norm=norms[0])
        self.conv2 = Conv2d(WIDTH, WIDTH, 3, padding=1, groups=GROUPS, bias=norm == "", norm=norms[1])
        self.conv3 = Conv2d(WIDTH, WIDTH, 1, bias=True)
        self.classifier = nn.Linear(WIDTH, 5)
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5), module.bias.normal_(0, 0.2)

    def forward(self, x):
        out = F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))
        return self.classifier(self.conv3(out).mean((2, 3)))


class Clipped(torch.optim.SGD):
    """Detectron2's full-model clipping: the norm is that of all gradients together."""

    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 0.05)
        return super().step(closure)


def optimizer_of(net, optimizer):
    return OPTIMIZERS[optimizer]([p for p in net.parameters() if p.requires_grad])


def steps(net, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return x


def make(norm, optimizer="sgd", seed=0, **options):
    torch.manual_seed(seed)
    net = ResidualNet(norm)
    opt = optimizer_of(net, optimizer)
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), opt, seed=seed, **{"frozen_norm": "keep", **options})
    return net, opt, scheme


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


CASES = [(norm, "adamw" if norm else "sgd") for norm in NORMS]
CASES += [("BN", optimizer) for optimizer in OPTIMIZERS if optimizer != "adamw"]


@pytest.mark.parametrize(("norm", "optimizer"), CASES)
def test_sub_network_trains_as_if_dropped_filters_did_not_exist(norm, optimizer, double):
    """Against the whole network with its dropped channels multiplied by 0, before and behind their norm."""
    net, opt, scheme = make(norm, optimizer)
    steps(net, opt, 3, seed=1)
    masked = copy.deepcopy(net)
    reference = optimizer_of(masked, optimizer)
    reference.load_state_dict(copy.deepcopy(opt.state_dict()))
    scheme.drop()
    assert scheme.num_dropped == math.floor(0.3 * 3 * WIDTH)
    for layer in scheme.layers:
        conv, kept = masked.get_submodule(layer.name), (~scheme.masks[layer.name]).view(-1, 1, 1)
        conv.register_forward_hook(lambda module, inputs, output, kept=kept: output * kept)
        if conv.norm is not None:
            conv.norm.register_forward_pre_hook(lambda module, inputs, kept=kept: inputs[0] * kept)
    steps(net, opt, 4, seed=2)
    steps(masked, reference, 4, seed=2)
    for name, value in masked.state_dict().items():  # kernels that read dropped channels decay in both
        mask = scheme.masks.get(name.partition(".")[0])
        kept = ~mask if mask is not None and value.dim() else ...
        torch.testing.assert_close(net.state_dict()[name][kept], value[kept], rtol=1e-9, atol=1e-11)
    for layer in scheme.layers:
        dropped = scheme.masks[layer.name]
        states = [value for p in layer.parameters() for value in opt.state[p].values() if value.shape == p.shape]
        assert not any(tensor[dropped].any() for tensor in [*layer.tensors().values(), *states]), layer.name


def first_group(layer):
    """A criterion that drops all filters of conv2's first group."""
    return torch.arange(WIDTH) < (WIDTH // GROUPS if layer.name == "conv2" else 0)


RETURNS = [*((norm, "kept", "ortho") for norm in NORMS), ("BN", "old", "ortho"), ("FrozenBN", "unit", "ortho")]


@pytest.mark.parametrize(("norm", "scale", "criterion"), [*RETURNS, ("BN", "kept", first_group)])
def test_restored_filters_are_orthogonal_reset_and_scaled(norm, scale, criterion):
    """Orthogonal to the kept and the old filters of their group: those of another group look at other channels."""
    net, opt, scheme = make(norm, "adam", scale=scale, criterion=criterion)
    steps(net, opt, 3, seed=1)
    before = copy.deepcopy({layer.name: layer.tensors() for layer in scheme.layers})
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    steps(net, opt, 3, seed=2)
    kept_then = {x.name: {key: value.detach().clone() for key, value in x.tensors().items()} for x in scheme.layers}
    event = scheme.restore()
    assert not scheme.is_sub and scheme.cycle == 1
    in_use, after = [], []  # O_f of the kept filters, and of all
    for layer in scheme.layers:
        weight, old = layer.weight.detach(), before[layer.name]["weight"].detach()
        mask, largest = masks[layer.name], 0.0
        for rows in np.split(np.arange(WIDTH), layer.conv.groups):
            kept, out = rows[~mask[rows]], rows[mask[rows]]
            new, others = unit_rows(weight[out]), unit_rows(old[out], weight[kept])
            cosines = np.abs(others @ new.T)
            largest = max(largest, cosines.max(initial=0))
            if len(new) <= others.shape[1] - np.linalg.matrix_rank(others):
                assert cosines.max(initial=0) <= 1e-5
            else:  # conv1: 27 dimensions, conv3: 32
                smallest = np.linalg.eigvalsh(others.T @ others)[: len(new)].sum()
                assert (cosines**2).sum() == pytest.approx(smallest, rel=1e-4, abs=1e-6)
            np.testing.assert_allclose(new @ new.T, np.eye(len(new)), atol=1e-5)
            in_use.append(textbook_overlap(weight[kept]))
        after.append(textbook_overlap(weight, layer.conv.groups))
        np.testing.assert_allclose(event.overlaps[layer.name], after[-1], atol=2e-6)
        assert event.max_cosine.get(layer.name, 0.0) == pytest.approx(largest, abs=1e-6)
        sizes = weight.flatten(1).norm(dim=1).numpy()
        wanted = {"kept": sizes[~mask].mean(), "old": old[mask].flatten(1).norm(dim=1).numpy(), "unit": 1.0}[scale]
        np.testing.assert_allclose(sizes[mask], np.broadcast_to(wanted, mask.sum()), rtol=1e-5)
        for name, tensor in layer.tensors().items():
            assert torch.equal(tensor[~mask], kept_then[layer.name][name][~mask])
            if norm == "FrozenBN" and name.startswith("norm."):
                assert torch.equal(tensor[mask], before[layer.name][name][mask])
            elif name != "weight":
                assert (tensor[mask] == (name == "norm.weight")).all()
        if layer.kind == "batch":
            assert (layer.norm.running_mean[mask] == 0).all() and (layer.norm.running_var[mask] == 1).all()
        for state in [opt.state[parameter] for parameter in layer.parameters()]:
            assert not state["exp_avg"][mask].any()
            squares = state["exp_avg_sq"].double()
            np.testing.assert_allclose(squares[mask], squares[~mask].mean(), rtol=1e-5)
    assert event.overlap_before == pytest.approx(np.concatenate(in_use).mean(), abs=1e-9)
    assert event.overlap_after == pytest.approx(np.concatenate(after).mean(), abs=1e-9)
    x = steps(net, opt, 2, seed=3)
    assert torch.isfinite(net(x)).all()


def test_transitions_in_the_wrong_order_and_states_of_other_models_are_refused():
    net, opt, scheme = make("BN")
    with pytest.raises(RuntimeError, match="no filters are dropped"):
        scheme.restore()
    scheme.drop()
    with pytest.raises(RuntimeError, match="dropped already"):
        scheme.drop()
    state = scheme.state_dict()
    other = RePrScheme(find_filter_layers(net, ["conv1"]), opt, frozen_norm="keep")
    assert "covers 3 layers, this run has 1" in refused(other.load_state_dict, state)
    _, _, fresh = make("BN")
    with pytest.raises(UserError, match=r"dropped filters of conv. are not zero any more in the model, which"):
        fresh.load_state_dict(state)


def test_new_directions_depend_on_seed_cycle_and_layer_alone():
    """Two layers of the same weights lose the same filters, in every cycle."""
    torch.manual_seed(0)
    start = torch.randn(16, 8, 3, 3)

    def returned(seed: int, cycle: int) -> list[torch.Tensor]:
        net = nn.ModuleList([nn.Conv2d(8, 16, 3, bias=False) for _ in range(2)])
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        scheme = RePrScheme(find_filter_layers(net, ["*"]), optimizer, seed=seed, drop_ratio=0.25)
        for _ in range(cycle + 1):
            for conv in net:
                conv.weight.data.copy_(start)
            dropped = scheme.drop().dropped
            torch.rand(3)  # draws of others do not count
            scheme.restore()
        return [conv.weight.detach()[dropped["0"][:4]] for conv in net]

    first = returned(3, 0)
    assert all(map(torch.equal, first, returned(3, 0)))
    for other in (first[1], returned(4, 0)[0], returned(3, 1)[0]):
        assert (first[0] - other).flatten(1).norm(dim=1).min() > 0.1 * first[0].flatten(1).norm(dim=1).max()
