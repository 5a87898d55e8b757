"""Optimizers of other kinds: whose ``step`` calls that of its base, that wrap another, that keep weights as state."""

import copy
import math
from contextlib import suppress
from functools import partial

import pytest
import torch
from plain_nets import IMAGES, in_sub_network, largest_dropped, loss_of, plain_net, plain_scheme, readable_net, train
from torch import nn

from repr_det import RePr, RePrSchedule, apply_repr
from repr_det.network.steps import scale_rates

TIMM = {"MADGRAD": 1e-3, "AdaBelief": 1e-3, "Adan": 1e-3, "Lion": 1e-4, "Lamb": 1e-3, "NAdamW": 1e-3, "RMSpropTF": 1e-3}
SHARES = (1, 1, 1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 1, 0.25, 0.5, 0.75, 1)  # of the rate; restores after steps 6, 12


class Clipping(torch.optim.SGD):
    """As Detectron2's projects write it; torch runs the hooks in ``step`` of both classes once an SGD has been used."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        self.fails, self.used = False, []

    def step(self, closure=None):
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        super().step(closure)
        if self.fails:
            raise KeyboardInterrupt

    def _init_group(self, group, *lists):
        self.used.append(float(group["lr"]))  # the rate with which parameters are moved, behind all hooks
        return super()._init_group(group, *lists)


def test_a_step_that_calls_its_base_class_counts_once_and_one_that_was_interrupted_not_at_all():
    net = readable_net()
    optimizer = Clipping(net.parameters(), lr=0.1, momentum=0.9)
    schedule = RePrSchedule(8, 4, 2)
    one = apply_repr(net, optimizer, 100, schedule=schedule)
    for step in range(14):
        optimizer.fails = step in (2, 5)
        try:
            train(net, optimizer, steps=1)
        except KeyboardInterrupt:
            continue
        assert one.phase == schedule.phase(one.steps)
    assert one.steps == 12


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_rates_are_those_of_the_schedule_but_around_the_step(rate):
    """Warm-up after every restore that brought filters back, also in a resumed run; a tensor stays the tensor that a
    compiled step reads."""

    def built(criterion="ortho"):
        net = readable_net()
        optimizer = Clipping(net.parameters(), lr=rate.clone() if torch.is_tensor(rate) else rate, momentum=0.9)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        one = RePr(net, optimizer, 20, schedule=RePrSchedule(3, 3, 2), warmup_iters=3, criterion=criterion)
        return net, optimizer, decay, one

    def run(net, optimizer, decay, one, steps):
        for _ in range(steps):
            train(net, optimizer, steps=1)
            one.step()
            assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 * 0.9 ** (one.steps - 1))
            decay.step()

    net, optimizer, decay, one = built()
    held = optimizer.param_groups[0]["lr"]
    run(net, optimizer, decay, one, 7)
    states = copy.deepcopy([part.state_dict() for part in (net, optimizer, decay, one)])
    del states[-1]["scheme"]["returned"]  # of version 0.1.0
    run(net, optimizer, decay, one, 9)
    wanted = [0.1 * 0.9**step * share for step, share in enumerate(SHARES)]
    assert optimizer.used == pytest.approx(wanted)
    assert optimizer.param_groups[0]["lr"] is held or not torch.is_tensor(rate)
    resumed = built()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    run(*resumed, 9)
    assert resumed[1].used == pytest.approx(wanted[7:])
    nothing = built(lambda layer: torch.full((layer.num_filters,), float("-inf")))
    run(*nothing, 7)
    assert nothing[1].used == pytest.approx([0.1 * 0.9**step for step in range(7)]) and nothing[3].scheme.cycle == 1
    for end in (RePr.finish, RePr.close):
        net, optimizer, decay, one = built()
        run(net, optimizer, decay, one, 7)
        end(one)
        resumed = built()
        resumed[3].load_state_dict(one.state_dict())
        for model, ended, before in ((net, optimizer, wanted[:7]), (*resumed[:2], [])):
            train(model, ended, steps=2)  # without calls of step()
            assert ended.used == pytest.approx([*before, *[float(ended.param_groups[0]["lr"])] * 2])
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize(("kind", "inside"), [("ExponentialLR", True), ("ExponentialLR", False), ("LambdaLR", False)])
def test_rates_that_change_inside_a_step(kind, inside, rate):
    """Or in a hook of it: by a scheduler that computes a rate from the last one, or from the first."""
    optimizer, used = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], copy.deepcopy(rate)), []
    decay = {"ExponentialLR": 0.9, "LambdaLR": lambda step: 0.9**step}[kind]
    scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, decay)
    optimizer.register_step_post_hook(lambda *_: inside or scheduler.step())
    for shares in (iter(SHARES), iter(SHARES)):
        scale_rates([optimizer], partial(next, shares))
    optimizer.register_step_pre_hook(lambda *_: used.append(float(optimizer.param_groups[0]["lr"])))
    optimizer.register_step_pre_hook(lambda *_: scheduler.step() if inside else None)
    for number in range(1, len(SHARES) + 1):
        optimizer.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 * 0.9**number)
    assert used == pytest.approx([0.1 * 0.9**step * share**2 for step, share in enumerate(SHARES)])


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("fails", ["", "closure", "step"])
def test_rates_of_a_step_that_fails_and_of_two_that_scale_them(fails, rate):
    """Cosine annealing computes each rate from the last; a step that fails is left out, and its scheduler is not."""
    optimizer = Clipping([nn.Parameter(torch.ones(2, 2))], lr=copy.deepcopy(rate))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    handles = [handle for share in (0.5, 0.25) for handle in scale_rates([optimizer], lambda share=share: share)]
    for number in range(8):
        now = 0.05 * (1 + math.cos(math.pi * number / 10))
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(now)
        failing = fails if number == 3 else ""

        def closure(failing=failing):
            if failing == "closure":
                raise KeyboardInterrupt

        optimizer.fails = failing == "step"
        with suppress(KeyboardInterrupt):
            optimizer.step(closure)
        optimizer.fails = False
        if failing == "step":
            assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(now / 8)
            optimizer.step()
        assert optimizer.used[-1] == pytest.approx(now / 8) or failing == "closure"
        decay.step()
    for handle in handles:
        handle.remove()


class SharpnessAware(torch.optim.Optimizer):
    """Two passes a step, the second one's step made by an optimizer of its own (Foret et al., ICLR 2021): in one call,
    or in two that are not ``step``. The weight is set to the tensor that the state holds."""

    def __init__(self, params, **options):
        super().__init__(params, options)
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad, alpha=0.01)

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("two_calls", [False, True])
def test_an_optimizer_inside_another_is_counted_and_forgets_dropped_filters_too(two_calls):
    net = readable_net()
    optimizer = SharpnessAware(net.parameters(), lr=0.1, momentum=0.9)
    one = (apply_repr if two_calls else RePr)(net, optimizer, 20, schedule=RePrSchedule(4, 3, 1))

    def closure():
        optimizer.zero_grad()
        loss_of(net).backward()

    returned = {}
    for _ in range(9):
        closure()
        if two_calls:
            optimizer.first_step()
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
            one.step()
        if one.phase == "sub":
            assert largest_dropped(one.scheme) == 0
            returned = dict(one.scheme.masks)
    assert one.steps == 9 and one.scheme.cycle == 1
    for name, mask in returned.items():
        assert (net.get_submodule(name).weight[mask].flatten(1).norm(dim=1) > 0.1).all()


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al., 2024): its state z is a second set of weights, which training goes towards."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.clone())
            p.lerp_(z, 1 / self.steps).sub_(p.grad, alpha=1e-3 * (1 - 0.9 * (1 - 1 / self.steps)))
            z.sub_(p.grad, alpha=1e-3)


@pytest.mark.parametrize(
    ("returns", "by_gamma"), [("as_published", False), ("function_preserving", False), ("function_preserving", True)]
)
def test_weights_that_are_kept_as_state_return_with_the_filter(returns, by_gamma):
    net = readable_net(bias=True)
    if by_gamma:  # no kernels of the second conv can be silent
        nn.utils.parametrizations.weight_norm(net[3])
    optimizer = ScheduleFree(net.parameters(), lr=1e-3)
    _, _, scheme, masks = in_sub_network(net, optimizer, 10, 5, model=net, returns=returns)
    kept = {p: optimizer.state[p]["z"].clone() for p in net.parameters()}
    scheme.restore()
    for layer in scheme.layers:
        mask = masks[layer.name]
        for parameter in layer.parameters():
            z = optimizer.state[parameter]["z"]
            assert torch.equal(z[mask], parameter[mask])
            assert returns != "as_published" or torch.equal(z[~mask], kept[parameter][~mask])
    if by_gamma:
        assert 0 < net[1].weight[masks["0"]].max() < 1e-6
    elif returns == "function_preserving":
        assert masks["0"].any() and not optimizer.state[net[3].weight]["z"][~masks["3"]][:, masks["0"]].any()


@pytest.mark.parametrize("kind", ["Rprop", *TIMM])
def test_optimizers_of_torch_and_timm(kind):
    """Second weights and scales of many names: filters stay zero, return as they are given and go on from there."""
    net = plain_net()
    if kind == "Rprop":
        optimizer = torch.optim.Rprop(net.parameters(), lr=1e-3)
    else:
        optim = pytest.importorskip("timm.optim", reason="timm is not installed")
        optimizer = getattr(optim, kind)(net.parameters(), lr=TIMM[kind])
    _, _, scheme, masks = in_sub_network(net, optimizer, 10, 5)
    scheme.restore()
    if kind == "Rprop":  # ``step_size`` is how far an entry goes next: of 0 it would take forever to recover
        sizes, mask = optimizer.state[net[0].weight]["step_size"], masks["0"]
        torch.testing.assert_close(sizes[mask], sizes[~mask].mean().expand_as(sizes[mask]))
    given = {name: net.get_submodule(name).weight[mask].detach().flatten(1) for name, mask in masks.items()}
    train(net, optimizer, steps=1)
    scheme.check()
    train(net, optimizer, steps=2)
    for name, mask in masks.items():
        now = net.get_submodule(name).weight[mask].flatten(1)
        assert (nn.functional.cosine_similarity(now, given[name]) > 0.9).all()


def test_cumulative_statistics_begin_anew_where_the_network_changes():
    """BatchNorm2d(momentum=None) averages over all batches so far, of which most saw another network."""
    net = plain_net()
    net[1].momentum = None
    _, optimizer, scheme = plain_scheme(net)
    train(net, optimizer, steps=20)
    for transition in (scheme.drop, scheme.restore):
        transition()
        assert net[1].num_batches_tracked == 0 and net[4].num_batches_tracked > 0
        with torch.no_grad():
            net(IMAGES)
            seen = net[0](IMAGES)
        torch.testing.assert_close(net[1].running_mean, seen.mean((0, 2, 3)))
        train(net, optimizer, steps=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by_itself", [True, False])
def test_a_compiled_step_is_counted(by_itself):
    torch._dynamo.reset()
    net = readable_net()
    optimizer = torch.optim.SGD(net.parameters(), torch.tensor(0.05), momentum=0.9)
    one = (apply_repr if by_itself else RePr)(net, optimizer, 100, schedule=RePrSchedule(2, 2, 1))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(net).backward()
        step()
        if not by_itself:
            one.step()
    assert one.steps == 5 and one.scheme.cycle == 1
    torch._dynamo.reset()
