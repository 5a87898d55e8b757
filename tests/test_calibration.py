"""FrozenBN moments after a restore, and passes over training batches that leave no trace."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from repr_det import RePrScheme, find_filter_layers
from repr_det.criteria import CRITERIA, Criterion
from repr_det.passes import TrainingPasses, preserved_random_state, random_state, set_random_state, undisturbed

WIDTH = 16
LAYERS = ("conv1", "conv2", "conv3")


class InsideNet(nn.Module):
    """Norms inside the convs (Detectron2): conv1 - ReLU - conv2 - ReLU - conv3 + shortcut - classifier."""

    def __init__(self, norm=FrozenBatchNorm2d) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, WIDTH, 3, padding=1, bias=False, norm=norm(WIDTH))
        self.conv2 = Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False, norm=norm(WIDTH))
        self.conv3 = Conv2d(WIDTH, 2 * WIDTH, 1, bias=False, norm=norm(2 * WIDTH))
        self.shortcut = nn.Conv2d(3, 2 * WIDTH, 1)
        self.classifier = nn.Linear(2 * WIDTH, 4)

    def norm_of(self, name: str) -> nn.Module:
        return getattr(self, name).norm

    def forward(self, x):
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = F.relu_(self.conv3(out) + self.shortcut(x))
        return self.classifier(out.mean((2, 3)))


class SiblingNet(nn.Module):
    """Norms beside the convs (torchvision), which are those of another class with the same buffers."""

    def __init__(self, norm=torchvision.ops.FrozenBatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), norm(WIDTH)
        self.conv2, self.bn2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), norm(WIDTH)
        self.conv3, self.bn3 = nn.Conv2d(WIDTH, 2 * WIDTH, 1, bias=False), norm(2 * WIDTH)
        self.classifier = nn.Linear(2 * WIDTH, 4)

    def norm_of(self, name: str) -> nn.Module:
        return getattr(self, name.replace("conv", "bn"))

    def forward(self, x):
        out = F.relu_(self.bn1(self.conv1(x)))
        out = F.relu_(self.bn2(self.conv2(out)))
        return self.classifier(self.bn3(self.conv3(out)).mean((2, 3)))


def batches(number: int, cycle: int) -> list[torch.Tensor]:
    """Images with a mean and with a different size of every channel, 10 x 12 px."""
    generator = torch.Generator().manual_seed(1000 * cycle + number)
    scale, shift = torch.tensor([1.0, 3.0, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, -2.0, 0.1]).view(1, 3, 1, 1)
    return [torch.randn(2, 3, 10, 12, generator=generator) * scale + shift for _ in range(number)]


def passes_of(net: nn.Module, log: list | None = None) -> TrainingPasses:
    def draw(number, cycle):
        if log is not None:
            log.append((number, cycle))
        return batches(number, cycle)

    return TrainingPasses(net, draw, lambda batch: net(batch).square().mean(), torch.cat)


def output_statistics(net: nn.Module, images: torch.Tensor, of: str = "norm") -> dict[str, tuple]:
    """Layer -> mean and standard deviation of each channel after the norm (or the input of the norm), in float64."""
    seen, handles = {}, []
    for name in LAYERS:

        def record(module, inputs, output, name=name):
            seen[name] = (output if of == "norm" else inputs[0]).detach().double().numpy().copy()

        handles.append(net.norm_of(name).register_forward_hook(record))
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return {name: (x.mean((0, 2, 3)), x.std((0, 2, 3))) for name, x in seen.items()}


def fuse(net: nn.Module, images: torch.Tensor, seed: int) -> None:
    """Buffers as in the official MSRA weights: mean 0, variance 1, weight gamma / sigma, bias beta - mu weight."""
    rng = np.random.default_rng(seed)
    for name in LAYERS:
        norm = net.norm_of(name)
        norm.running_mean.zero_(), norm.running_var.fill_(1)
        mu, sigma = output_statistics(net, images, of="input")[name]
        gamma, beta = rng.uniform(0.2, 1.5, len(mu)) * rng.choice([-1, 1], len(mu)), rng.normal(0, 1, len(mu))
        norm.weight.copy_(torch.tensor(gamma / sigma))
        norm.bias.copy_(torch.tensor(beta - mu * gamma / sigma))


def make(model=InsideNet, fused: bool = True, log: list | None = None, **options):
    torch.manual_seed(0)
    net = model()
    images = torch.cat(batches(4, 0))
    if fused:
        fuse(net, images, seed=1)
    else:
        for name in LAYERS:
            norm = net.norm_of(name)
            norm.running_mean.normal_(0, 1), norm.running_var.uniform_(0.5, 3)
            norm.weight.uniform_(0.3, 2), norm.bias.normal_(0, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)
    options = {"criterion": "random", "drop_ratio": 0.4, "calibration_batches": 4, **options}
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), optimizer, passes=passes_of(net, log), **options)
    return net, optimizer, scheme, images


def train(net, optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        optimizer.zero_grad()
        x, y = torch.randn(8, 3, 10, 12, generator=generator), torch.randint(4, (8,), generator=generator)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def buffers(net: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {k: getattr(net.norm_of(name), k).clone() for k in ("weight", "bias", "running_mean", "running_var")}
        for name in LAYERS
    }


def assert_same_moments(after, before, masks):
    """Mean and standard deviation of the masked channels of every layer."""
    for name in LAYERS:
        for moment in range(2):
            np.testing.assert_allclose(
                after[name][moment][masks[name]], before[name][moment][masks[name]], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("model", [InsideNet, SiblingNet])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("scale", ["kept", "unit"])
def test_restored_channels_have_their_moments_of_before_the_drop(model, fused, scale):
    net, optimizer, scheme, images = make(model, fused, scale=scale)
    before, old = output_statistics(net, images), buffers(net)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    assert all(mask.sum() >= 3 for mask in masks.values())
    train(net, optimizer, 5)
    kept_weights = {n: getattr(net, n).weight.detach()[~masks[n]].clone() for n in LAYERS}
    scheme.restore()
    after, new = output_statistics(net, images), buffers(net)
    for name in LAYERS:
        mask = masks[name]
        for moment in range(2):
            np.testing.assert_allclose(after[name][moment][mask], before[name][moment][mask], rtol=1e-4, atol=1e-5)
        for key in ("weight", "bias"):
            assert torch.equal(new[name][key], old[name][key]), (name, key)
        for key in ("running_mean", "running_var"):
            assert torch.equal(new[name][key][~mask], old[name][key][~mask]), (name, key)
            assert (new[name][key][mask] != old[name][key][mask]).all(), (name, key)
        assert (new[name]["running_var"] >= 0).all()
        assert torch.equal(getattr(net, name).weight.detach()[~mask], kept_weights[name])


def test_keeping_the_statistics_gives_other_moments_and_needs_no_batches():
    net, _, scheme, images = make(frozen_norm="keep", log=(log := []))
    before, old = output_statistics(net, images), buffers(net)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    scheme.restore()
    assert log == []
    new = buffers(net)
    for name in LAYERS:
        assert all(torch.equal(new[name][k], old[name][k]) for k in new[name])
        # The check above would see the difference.
        change = np.abs(output_statistics(net, images)[name][1] / before[name][1] - 1)[masks[name]]
        assert change.max() > 0.1


def test_the_same_batches_at_the_drop_and_the_restore_and_others_in_the_next_cycle():
    net, _, scheme, _ = make(log=(log := []), calibration_batches=3)
    scheme.drop(), scheme.restore()
    assert log == [(3, 0), (3, 0)]
    scheme.drop()
    before = len(log)
    images = torch.cat(batches(3, 1))
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    scheme.restore()
    assert log[2:] == [(3, 1), (3, 1)] and before == 3
    assert all(np.isfinite(output_statistics(net, images)[name][0][masks[name]]).all() for name in LAYERS)


def test_moments_of_the_second_cycle_are_matched_too():
    net, optimizer, scheme, _ = make()
    scheme.drop(), train(net, optimizer, 2), scheme.restore()
    train(net, optimizer, 2)
    images = torch.cat(batches(4, 1))
    before = output_statistics(net, images)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    train(net, optimizer, 2)
    scheme.restore()
    after = output_statistics(net, images)
    assert_same_moments(after, before, masks)


def test_a_restore_after_saving_and_loading_matches_the_same_moments(tmp_path):
    net, _, scheme, images = make()
    before = output_statistics(net, images)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    torch.save({"model": net.state_dict(), "scheme": scheme.state_dict()}, tmp_path / "state.pth")
    other, _, loaded, _ = make(fused=False)
    saved = torch.load(tmp_path / "state.pth", weights_only=True)
    other.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["scheme"])
    loaded.restore()
    after = output_statistics(other, images)
    assert_same_moments(after, before, masks)


# --- channels that have no scale ------------------------------------------------------------------------------------


CHOSEN = [1, 4, 7, 9, 11, 12]
TINY = torch.tensor([1e-6, 1e-9, 1e-13, 1e-20, 1e-30, -1e-40])


def zero_gamma(net, beta=0.0):
    net.conv3.norm.weight[CHOSEN] = 0
    net.conv3.norm.bias[CHOSEN] = beta


def tiny_gamma(net):
    net.conv3.norm.weight[CHOSEN] = TINY


def dead_rows(net):
    net.conv3.weight[CHOSEN] = 0


def zero_variance(net):
    dead_rows(net)
    net.conv3.norm.running_var[CHOSEN] = 0


def constant_inputs(net):
    net.conv2.norm.weight.zero_()
    net.conv2.norm.bias.fill_(1)


def dead_inputs(net):
    net.conv2.norm.weight.zero_()
    net.conv2.norm.bias.zero_()


NO_SCALE = {  # what happens before the drop, and while the filters are away
    "gamma 0": (zero_gamma, None),
    "gamma 0, beta 1": (lambda net: zero_gamma(net, 1.0), None),
    "tiny gamma": (tiny_gamma, None),
    "dead at the drop": (dead_rows, None),
    "dead at the drop, variance 0": (zero_variance, None),
    "constant at both": (constant_inputs, None),
    "constant at both, tiny gamma": (lambda net: (constant_inputs(net), tiny_gamma(net)), None),
    "dead at both": (dead_inputs, None),
    "constant at the restore": (None, constant_inputs),
    "dead at the restore": (None, dead_inputs),
    "dead at the drop, constant at the restore": (dead_rows, constant_inputs),
}


@pytest.mark.parametrize("case", NO_SCALE)
def test_channels_without_a_scale_stay_finite(case, monkeypatch):
    def score(layers, _):
        scores = {layer.name: torch.zeros(layer.num_filters) for layer in layers}
        scores["conv3"][CHOSEN] = 1
        return scores

    monkeypatch.setitem(CRITERIA, "chosen", Criterion(score))
    net, optimizer, scheme, images = make(criterion="chosen", drop_ratio=0.1)  # 6 of 64
    before_drop, before_restore = NO_SCALE[case]
    with torch.no_grad():
        before_drop and before_drop(net)
        before, old = output_statistics(net, images), buffers(net)
        scheme.drop()
        assert scheme.masks["conv3"].nonzero().flatten().tolist() == CHOSEN
        before_restore and before_restore(net)
        scheme.restore()
    after = output_statistics(net, images)
    assert np.isfinite(after["conv3"][0]).all() and np.isfinite(after["conv3"][1]).all()
    kept = [i for i in range(2 * WIDTH) if i not in CHOSEN]
    for key, value in buffers(net)["conv3"].items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value[kept], old["conv3"][key][kept]), key
    assert (net.conv3.norm.running_var >= 0).all()
    if "gamma 0" in case:  # such a channel is its beta, before and after
        for moment in range(2):
            np.testing.assert_allclose(after["conv3"][moment][CHOSEN], before["conv3"][moment][CHOSEN], atol=1e-6)
    # No channel gets out of hand either: it is at most as far from its bias as a normalised one.
    weight, bias = (old["conv3"][key].abs().max().item() for key in ("weight", "bias"))
    assert after["conv3"][1][CHOSEN].max() <= max(before["conv3"][1].max(), weight) * 1.01
    assert np.abs(after["conv3"][0][CHOSEN]).max() <= max(np.abs(before["conv3"][0]).max(), bias) + 1e-3
    train(net, optimizer, 2)
    assert torch.isfinite(net(images)).all()


def test_a_scale_out_of_reach_of_eps_still_gets_its_mean():
    """sqrt(v + eps) >= sqrt(eps): a filter that is far too small cannot have the old deviation, but the old mean."""
    net, _, scheme, images = make(model=InsideNet)
    before = output_statistics(net, images)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    with torch.no_grad():
        for name in LAYERS:
            getattr(net, name).weight.mul_(1e-5)  # "kept" makes the new filters as small
    scheme.restore()
    after = output_statistics(net, images)
    for name in LAYERS:
        np.testing.assert_allclose(after[name][0][masks[name]], before[name][0][masks[name]], rtol=1e-3, atol=1e-4)
        assert (after[name][1][masks[name]] <= before[name][1][masks[name]] * 1.001).all()


def test_what_follows_the_last_layer_is_not_computed():
    net, optimizer, scheme, _ = make()
    train(net, optimizer, 1)
    reached = []
    for name in (*LAYERS, "classifier"):
        getattr(net, name).register_forward_hook(lambda module, inputs, output, name=name: reached.append(name))
    scheme.drop()
    assert set(reached) == {"conv1", "conv2"}  # conv3's own hooks come after those of the norm inside it
    reached.clear()
    scheme.restore()
    assert set(reached) == {"conv1", "conv2"}


def test_layers_that_the_batches_do_not_reach_keep_their_statistics():
    class Unused(InsideNet):
        def __init__(self) -> None:
            super().__init__()
            self.conv4 = Conv2d(3, WIDTH, 1, bias=False, norm=FrozenBatchNorm2d(WIDTH))
            self.conv4.norm.running_mean.fill_(0.25)

    net, _, scheme, _ = make(Unused)
    old = {k: v.clone() for k, v in net.conv4.norm.named_buffers()}
    scheme.drop()
    assert scheme.masks["conv4"].any()
    scheme.restore()
    for key, value in net.conv4.norm.named_buffers():
        assert torch.equal(value, old[key])


# --- leaving no trace -----------------------------------------------------------------------------------------------


def draw_from_everything() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()


def seed_everything() -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    random.gauss(0, 1), np.random.randn()  # both keep a second value for the next call


class NoisyNet(nn.Module):
    """BN, dropout and a part in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.evaluated = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        draw_from_everything()
        return self.drop(self.evaluated(self.bn(self.conv(x)))).square().mean()


def snapshot(net: nn.Module):
    return (
        {name: value.clone() for name, value in net.state_dict().items()},
        {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()},
        {name: module.training for name, module in net.named_modules()},
    )


def assert_unchanged(net: nn.Module, before) -> None:
    values, gradients, modes = before
    for name, value in net.state_dict().items():
        assert torch.equal(value, values[name]), name
    for name, parameter in net.named_parameters():
        gradient, value = gradients[name]
        assert parameter.grad is gradient, name
        assert gradient is None or torch.equal(gradient, value), name
    assert {name: module.training for name, module in net.named_modules()} == modes


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_undisturbed_puts_everything_back(fails, backward):
    seed_everything()
    net = NoisyNet()
    net(torch.randn(2, 3, 6, 6)).backward()
    net.conv.bias.grad = None
    net.bn.eval()
    before = snapshot(net)
    seed_everything()
    expected = draw_from_everything()
    seed_everything()
    try:
        with undisturbed(net):
            assert all(module.training for module in net.modules())
            assert all(parameter.grad is None for parameter in net.parameters())
            loss = net(torch.randn(2, 3, 6, 6))
            if backward:
                loss.backward()
            assert not torch.equal(net.bn.running_mean, before[0]["bn.running_mean"])
            assert net.bn.num_batches_tracked != before[0]["bn.num_batches_tracked"]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert draw_from_everything() == expected
    assert_unchanged(net, before)


def test_random_state_survives_a_file_that_holds_weights_only(tmp_path):
    seed_everything()
    torch.save(random_state(), tmp_path / "state.pth")
    expected = [draw_from_everything() for _ in range(5)]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert [draw_from_everything() for _ in range(5)] == expected


def test_preserved_random_state():
    seed_everything()
    expected = draw_from_everything()
    seed_everything()
    with preserved_random_state():
        draw_from_everything(), np.random.seed(1), torch.manual_seed(2)
    assert draw_from_everything() == expected


@pytest.mark.parametrize("transition", ["drop", "restore"])
def test_transitions_leave_random_states_gradients_and_modes_alone(transition):
    net, optimizer, scheme, _ = make()
    plain = scheme.passes.loss
    scheme.passes.loss = lambda batch: plain(batch) + draw_from_everything()[0]
    train(net, optimizer, 1)
    if transition == "restore":
        scheme.drop()
    net.conv2.eval()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    values = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    modes = {name: module.training for name, module in net.named_modules()}
    seed_everything()
    expected = draw_from_everything()
    seed_everything()
    getattr(scheme, transition)()
    assert draw_from_everything() == expected
    for name, parameter in net.named_parameters():
        assert parameter.grad is gradients[name]
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])
    assert {name: module.training for name, module in net.named_modules()} == modes
    for norm in map(net.norm_of, LAYERS):
        assert not norm._forward_hooks and not norm._forward_pre_hooks


def test_no_hook_stays_where_a_pass_fails():
    net, _, scheme, _ = make()

    def fail(batch):
        net.conv1(batch)
        raise RuntimeError("out of memory")

    scheme.passes.loss = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        scheme.drop()
    for norm in map(net.norm_of, LAYERS):
        assert not norm._forward_hooks and not norm._forward_pre_hooks


def test_statistics_of_trained_norms_are_not_moved_by_the_passes():
    class Mixed(InsideNet):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm2d(3)

        def forward(self, x):
            return super().forward(self.first(x))

    net, _, scheme, _ = make(Mixed, fused=False)
    before = {k: v.clone() for k, v in net.first.state_dict().items()}
    scheme.drop(), scheme.restore()
    for key, value in net.first.state_dict().items():
        assert torch.equal(value, before[key]), key
