"""Passes over training batches leave no trace."""

import random

import numpy as np
import pytest
import torch
from frozen_nets import LAYERS, InsideNet, make, train
from torch import nn

from repr_det.method.passes import passes_over
from repr_det.network.state import preserved_random_state, random_state, set_random_state, undisturbed


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


class Growing(nn.Module):
    """Registers, replaces or resizes a buffer in its forward pass."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how = how
        if how != "registered":
            self.register_buffer("seen", None if how == "none" else torch.zeros(1))

    def forward(self, x):
        if self.how == "registered":
            self.register_buffer("seen", x.mean((0, 2, 3)))
        elif self.how == "resized in place":
            self.seen.resize_(x.shape[1]).fill_(1)
        else:
            self.seen = x.mean((0, 2, 3))
        return x


@pytest.mark.parametrize("how", ["registered", "none", "replaced", "resized in place"])
def test_buffers_that_come_into_being_are_put_back(how):
    net = Growing(how)
    before = dict(net._buffers)
    values = {name: None if buffer is None else buffer.clone() for name, buffer in before.items()}
    with undisturbed(net):
        net(torch.ones(2, 3, 4, 4))
        assert net.seen.shape == (3,)
    assert net._buffers.keys() == before.keys()
    for name, buffer in net._buffers.items():
        assert (buffer is None) == (values[name] is None)
        assert buffer is None or torch.equal(buffer, values[name])
        assert buffer is before[name] or how == "resized in place"


class Noisy(torch.utils.data.Dataset):
    """A data set with generators of its own, in an object of its own."""

    def __init__(self) -> None:
        self.rng, self.own = np.random.default_rng(0), random.Random(1)
        self.augment = [torch.Generator().manual_seed(2), {"legacy": np.random.RandomState(3)}]

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index):
        drawn = self.rng.normal() + self.own.random() + self.augment[1]["legacy"].rand()
        return index + drawn + torch.rand(1, generator=self.augment[0])


@pytest.mark.parametrize("mapped", [False, True], ids=["data set", "closure"])
def test_a_data_set_with_generators_of_its_own_is_left_alone(mapped):
    def images_of(with_passes: bool) -> list:
        data = Noisy()
        map_one = (lambda index: data[index]) if mapped else None
        own = torch.utils.data.DataLoader(range(16) if mapped else data, 4, collate_fn=_mapping(map_one))
        passes = passes_over(nn.ReLU(), own, sum)
        training = iter(torch.utils.data.DataLoader(data, 4))
        found = []
        for number, batch in enumerate(training):
            found.append(batch.flatten().tolist())
            if with_passes and number in (0, 2):
                passes.batches(2, number)
        return found

    assert images_of(True) == images_of(False)


def _mapping(map_one):
    return None if map_one is None else lambda batch: torch.stack([map_one(index) for index in batch])


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
        if parameter.grad is not None:
            # At a drop the gradients of dropped filters are cleared: a step that is still to come would move them.
            kept = ~scheme.masks.get(name.rpartition(".")[0], torch.zeros(len(parameter), dtype=torch.bool))
            assert torch.equal(parameter.grad[kept], values[name][kept]) and not parameter.grad[~kept].any()
    assert {name: module.training for name, module in net.named_modules()} == modes
    for norm in map(net.norm_of, LAYERS):
        assert not norm._forward_hooks and not norm._forward_pre_hooks


def test_no_hook_stays_where_a_pass_fails():
    net, _, scheme, _ = make()

    def fail(batch):
        net.conv1(batch)
        raise RuntimeError("out of memory")

    scheme.passes.loss = fail
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        scheme.drop()
    assert not scheme.is_sub
    assert_unchanged(net, before)
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
