"""RePrScheme over norm x optimizer against a network that has only the kept filters (invariants 1, 2 and 3)."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from repr_det import RePrScheme, UserError, find_filter_layers

NORMS = ["BN", "SyncBN", "naiveSyncBN", "FrozenBN", "GN", ""]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, foreach=True),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
}
WIDTH = 32  # get_norm("GN") has 32 groups


class ResidualNet(nn.Module):
    """conv1 - ReLU - conv2 + shortcut - ReLU - conv3 (bias) - classifier: a channel with and one without a ReLU of its
    own before it is added to something."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        bias = norm == ""
        self.shortcut = Conv2d(3, WIDTH, 1, bias=False)
        self.conv1 = Conv2d(3, WIDTH, 3, padding=1, bias=bias, norm=get_norm(norm, WIDTH))
        self.conv2 = Conv2d(WIDTH, WIDTH, 3, padding=1, bias=bias, norm=get_norm(norm, WIDTH))
        self.conv3 = Conv2d(WIDTH, WIDTH, 1, bias=True)
        self.classifier = nn.Linear(WIDTH, 5)
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)

    def forward(self, x):
        out = F.relu(self.conv1(x))
        out = F.relu(self.conv2(out) + self.shortcut(x))
        return self.classifier(self.conv3(out).mean((2, 3)))


def norm_without_dropped(x: torch.Tensor, norm: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The norm applied to kept channels ``rows`` only; for GN the dropped ones stand as zeros in their groups."""
    if norm is None:
        return x
    if isinstance(norm, nn.GroupNorm):
        full = x.new_zeros(x.shape[0], WIDTH, *x.shape[2:]).index_copy(1, rows, x)
        return F.group_norm(full, norm.num_groups, None, None, norm.eps)[:, rows]
    if isinstance(norm, FrozenBatchNorm2d):
        scale = (norm.running_var[rows] + norm.eps).rsqrt().view(1, -1, 1, 1)
        return (x - norm.running_mean[rows].view(1, -1, 1, 1)) * scale
    return F.batch_norm(x, None, None, training=True, eps=norm.eps)


class PrunedNet(nn.Module):
    """ResidualNet without the dropped filters: smaller parameters of its own, the shortcut as wide as before."""

    def __init__(self, net: ResidualNet, masks: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.shortcut, self.classifier = copy.deepcopy(net.shortcut), copy.deepcopy(net.classifier)
        self.rows = {n: (~m).nonzero().flatten() for n, m in masks.items()}
        self.norms = {n: copy.deepcopy(getattr(net, n).norm) for n in masks}
        inputs = {"conv1": torch.arange(3), "conv2": self.rows["conv1"], "conv3": torch.arange(WIDTH)}
        self.own = nn.ParameterDict()
        for name, rows in self.rows.items():
            conv = getattr(net, name)
            self.own[f"{name}_weight"] = conv.weight.detach()[rows][:, inputs[name]].clone()
            if conv.bias is not None:
                self.own[f"{name}_bias"] = conv.bias.detach()[rows].clone()
            norm = conv.norm
            if norm is not None:
                for part in ("weight", "bias"):
                    value = getattr(norm, part).detach()[rows].clone()
                    self.own[f"{name}_norm_{part}"] = nn.Parameter(value, isinstance(getattr(norm, part), nn.Parameter))

    def conv(self, name, x, padding):
        own = self.own
        x = F.conv2d(x, own[f"{name}_weight"], own.get(f"{name}_bias", None), padding=padding)
        x = norm_without_dropped(x, self.norms[name], self.rows[name])
        if f"{name}_norm_weight" in own:
            x = x * own[f"{name}_norm_weight"].view(1, -1, 1, 1) + own[f"{name}_norm_bias"].view(1, -1, 1, 1)
        return x

    def forward(self, x):
        out = F.relu(self.conv("conv1", x, 1))
        out = F.relu(self.shortcut(x).index_add(1, self.rows["conv2"], self.conv("conv2", out, 1)))
        out = self.conv("conv3", out, 0)
        pooled = out.new_zeros(len(x), WIDTH).index_copy(1, self.rows["conv3"], out.mean((2, 3)))
        return self.classifier(pooled)


def clipped(optimizer, kind):
    if kind == "none":
        return optimizer
    if kind == "full_model":

        class FullModelClipping(type(optimizer)):
            def step(self, closure=None):
                torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 0.05)
                return super().step(closure)

        optimizer.__class__ = FullModelClipping
        return optimizer
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.01
    wrapped = maybe_add_gradient_clipping(cfg, optimizer)
    return wrapped


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def steps(net, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return x


def make(norm, optimizer="sgd", clip="none", seed=0, **options):
    torch.manual_seed(seed)
    net = ResidualNet(norm)
    opt = clipped(OPTIMIZERS[optimizer](trainable(net)), clip)
    options = {"frozen_norm": "keep", **options}
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), opt, seed=seed, **options)
    return net, opt, scheme


# Clipping is tried with one optimizer of each family.
TRAINED_BY = [(o, "none") for o in OPTIMIZERS] + [
    (o, c) for o in ("sgd", "adamw") for c in ("value", "norm", "full_model")
]


@pytest.mark.parametrize(("optimizer", "clip"), TRAINED_BY)
@pytest.mark.parametrize("norm", NORMS)
def test_sub_network_trains_as_if_dropped_filters_did_not_exist(norm, optimizer, clip):
    net, opt, scheme = make(norm, optimizer, clip)
    steps(net, opt, 3, seed=1)
    scheme.drop()
    assert scheme.num_dropped == math.floor(0.3 * 3 * WIDTH)
    pruned = PrunedNet(net, scheme.masks)
    # Same optimizer state for the kept entries: both start their moments anew.
    for state in opt.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()
    reference = clipped(OPTIMIZERS[optimizer](trainable(pruned)), clip)
    net.double(), pruned.double()
    for norm_module in pruned.norms.values():
        norm_module and norm_module.double()
    for state in opt.state.values():
        for key, value in state.items():
            state[key] = value.double() if torch.is_tensor(value) and value.dim() else value
    torch.set_default_dtype(torch.float64)
    try:
        for seed in (2, 3, 4, 5):
            x = steps(net, opt, 1, seed)
            steps(pruned, reference, 1, seed)
        outputs = {}
        for name in scheme.masks:
            getattr(net, name).register_forward_hook(lambda m, i, o, n=name: outputs.__setitem__(n, o))
        net(x)
    finally:
        torch.set_default_dtype(torch.float32)

    inputs = {"conv1": torch.arange(3), "conv2": pruned.rows["conv1"], "conv3": torch.arange(WIDTH)}
    for layer in scheme.layers:
        kept, dropped = pruned.rows[layer.name], scheme.masks[layer.name]
        for name, tensor in layer.tensors().items():
            assert torch.count_nonzero(tensor[dropped]) == 0, (layer.name, name)
            expected = pruned.own[f"{layer.name}_{name.replace('.', '_')}"]
            found = tensor[kept]
            if name == "weight":
                # Kernels on dropped input channels only decay; all others are those of the small network.
                found = found[:, inputs[layer.name]]
            torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-11)
        for parameter in layer.parameters():
            for key, value in opt.state[parameter].items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    assert torch.count_nonzero(value[dropped]) == 0, (layer.name, key)
        assert torch.count_nonzero(outputs[layer.name][:, dropped]) == 0
    torch.testing.assert_close(net.classifier.weight, pruned.classifier.weight, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(net.shortcut.weight, pruned.shortcut.weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", ["kept", "old", "unit"])
@pytest.mark.parametrize("norm", NORMS)
def test_restored_filters_are_orthogonal_reset_and_scaled(norm, scale):
    net, opt, scheme = make(norm, "adam", scale=scale)
    steps(net, opt, 3, seed=1)
    before = {x.name: {k: t.detach().clone() for k, t in x.tensors().items()} for x in scheme.layers}
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    steps(net, opt, 3, seed=2)
    kept_then = {x.name: {k: t.detach().clone() for k, t in x.tensors().items()} for x in scheme.layers}
    event = scheme.restore()
    assert not scheme.is_sub and scheme.cycle == 1
    for layer in scheme.layers:
        mask = masks[layer.name]
        if not mask.any():
            continue
        new = layer.weight.detach()[mask].flatten(1).double().numpy()
        old = before[layer.name]["weight"][mask].flatten(1).double().numpy()
        kept = layer.weight.detach()[~mask].flatten(1).double().numpy()
        unit = [w / np.linalg.norm(w, axis=1, keepdims=True) for w in (new, old, kept)]
        others = np.concatenate(unit[1:])
        cosines = np.abs(others @ unit[0].T)
        assert event.max_cosine[layer.name] == pytest.approx(cosines.max(), abs=1e-6)
        rank = np.linalg.matrix_rank(others)
        if len(new) <= others.shape[1] - rank:
            assert cosines.max() <= 1e-5
        else:  # conv1: 27 dimensions, conv3: 32
            smallest = np.linalg.eigvalsh(others.T @ others)[: len(new)].sum()
            assert (cosines**2).sum() == pytest.approx(smallest, rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(unit[0] @ unit[0].T, np.eye(len(new)), atol=1e-5)
        wanted = {"kept": np.linalg.norm(kept, axis=1).mean(), "old": np.linalg.norm(old, axis=1), "unit": 1.0}[scale]
        np.testing.assert_allclose(np.linalg.norm(new, axis=1), np.broadcast_to(wanted, len(new)), rtol=1e-5)
        expected = {"bias": 0.0, "norm.weight": 1.0, "norm.bias": 0.0}
        for name, tensor in layer.tensors().items():
            assert torch.equal(tensor[~mask], kept_then[layer.name][name][~mask])
            if norm == "FrozenBN" and name.startswith("norm."):
                assert torch.equal(tensor[mask], before[layer.name][name][mask])
            elif name != "weight":
                assert (tensor[mask] == expected[name]).all()
        if norm.endswith("BN") and norm != "FrozenBN" and layer.norm is not None:
            assert (layer.norm.running_mean[mask] == 0).all() and (layer.norm.running_var[mask] == 1).all()
        for parameter in layer.parameters():
            state = opt.state[parameter]
            if state:
                assert torch.count_nonzero(state["exp_avg"][mask]) == 0
                squares = state["exp_avg_sq"].double()
                np.testing.assert_allclose(squares[mask], squares[~mask].mean(), rtol=1e-5)
    x = steps(net, opt, 2, seed=3)
    assert torch.isfinite(net(x)).all()


def test_all_norms_are_what_they_are_called():
    kinds = {n: type(get_norm(n, 4)).__name__ for n in ("BN", "naiveSyncBN", "FrozenBN")}
    assert kinds == {"BN": "BatchNorm2d", "naiveSyncBN": NaiveSyncBatchNorm.__name__, "FrozenBN": "FrozenBatchNorm2d"}


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", ""])
@pytest.mark.parametrize("phase", ["full", "sub"])
def test_saved_and_loaded_scheme_continues_bit_for_bit(norm, phase, tmp_path):
    def run(save_at=None):
        net, opt, scheme = make(norm, "adamw", criterion="random")
        for i in range(14):
            if i == save_at:
                torch.save({"m": net.state_dict(), "o": opt.state_dict(), "s": scheme.state_dict()}, tmp_path / "c.pth")
                net, opt, scheme = make(norm, "adamw", seed=99, criterion="random")  # other weights, to be overwritten
                saved = torch.load(tmp_path / "c.pth", weights_only=True)
                net.load_state_dict(saved["m"])
                opt.load_state_dict(saved["o"])
                scheme.load_state_dict(saved["s"])
            steps(net, opt, 1, seed=i)
            if i in (2, 8):
                scheme.drop()
            elif i in (5, 11):
                scheme.restore()
        return net

    straight, resumed = run(), run(save_at={"full": 7, "sub": 10}[phase])
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_momentum_of_the_full_phase_does_not_outlive_the_drop():
    net, opt, scheme = make("BN")
    steps(net, opt, 3, seed=1)
    scheme.drop()
    conv = scheme.layers[0]
    assert torch.count_nonzero(opt.state[conv.weight]["momentum_buffer"][scheme.masks["conv1"]]) == 0
    assert torch.count_nonzero(opt.state[conv.weight]["momentum_buffer"][~scheme.masks["conv1"]]) > 0


def test_wrong_order_and_wrong_options_are_refused():
    net, opt, scheme = make("BN")
    with pytest.raises(RuntimeError, match="no filters are dropped"):
        scheme.restore()
    scheme.drop()
    with pytest.raises(RuntimeError, match="dropped already"):
        scheme.drop()
    layers = find_filter_layers(net, ["conv*"])
    for options, fragment in (
        ({"scale": "big"}, "^scale= must be one of kept, old, unit, got 'big'"),
        ({"frozen_norm": "x"}, "^frozen_norm= must be one of recalibrate, keep, got 'x'"),
        ({"criterion": "orto"}, "^criterion= must be one of"),
        ({"drop_ratio": 1.0}, r"^drop_ratio= must be in \(0, 1\), got 1.0"),
        ({"max_drop_per_layer": 0.2}, "must be at least drop_ratio= 0.3, got 0.2"),
    ):
        with pytest.raises(UserError, match=fragment):
            RePrScheme(layers, opt, **options)
    with pytest.raises(UserError, match="does not hold the weight of conv1"):
        RePrScheme(layers, torch.optim.SGD(net.classifier.parameters(), 0.1))


def test_state_of_other_layers_and_of_another_model_is_refused():
    net, opt, scheme = make("BN")
    scheme.drop()
    state = scheme.state_dict()
    other = RePrScheme(find_filter_layers(net, ["conv1"]), opt, frozen_norm="keep")
    with pytest.raises(UserError, match="covers 3 layers, this run has 1"):
        other.load_state_dict(state)
    _, _, fresh = make("BN")
    with pytest.raises(UserError, match=r"filters of conv. are dropped, but they are not zero"):
        fresh.load_state_dict(state)


def test_new_directions_depend_on_seed_cycle_and_layer_alone():
    """Two layers of the same weights lose the same filters, in every cycle."""
    torch.manual_seed(0)
    start = torch.randn(16, 8, 3, 3)

    def returned(seed: int, cycle: int) -> list[torch.Tensor]:
        net = nn.ModuleList([nn.Conv2d(8, 16, 3, bias=False) for _ in range(2)])
        scheme = RePrScheme(
            find_filter_layers(net, ["*"]), torch.optim.SGD(net.parameters(), 0.1), seed=seed, drop_ratio=0.25
        )
        for _ in range(cycle + 1):
            for conv in net:
                conv.weight.data.copy_(start)
            dropped = scheme.drop().dropped
            torch.rand(3)  # draws of others do not count
            scheme.restore()
        return [conv.weight.detach()[dropped["0"][:4]] for conv in net]

    first = returned(3, 0)
    assert all(map(torch.equal, first, returned(3, 0)))
    others = [first[1], returned(4, 0)[0], returned(3, 1)[0]]
    for other in others:
        assert (first[0] - other).flatten(1).norm(dim=1).min() > 0.1 * first[0].flatten(1).norm(dim=1).max()
