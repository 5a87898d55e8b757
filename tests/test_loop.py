"""RePr in one object: against the pieces it is made of, resumed anywhere, and what it refuses."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from conftest import COMPILES, assert_same_weights, refused
from plain_nets import IMAGES, readable_net, train
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from traced_nets import Net, conv

from repr_det import RePr, RePrSchedule, RePrScheme, UserError, apply_repr, find_filter_layers
from repr_det.method.options import option_names

SCHEDULE = RePrSchedule(3, 2, 2)  # drops after 2 and 7, restores after 4 and 9


def begin(make=RePr, total_steps=12, kind=torch.optim.SGD, build=readable_net, **options) -> RePr:
    net = build()
    return make(net, kind(net.parameters(), 0.05), total_steps, **{"schedule": SCHEDULE, **options})


def run(one: RePr, steps: int, after=RePr.step) -> None:
    for _ in range(steps):
        train(one.model, *one.scheme.optimizers, steps=1)
        after(one)


def skipping_net() -> Net:
    """A block that runs, and learns, in every fourth step."""

    def forward(net, x):
        net.calls += 1
        x = net.a(x).relu()
        return net.d(x + net.c(net.b(x).relu()) if net.calls % 4 == 1 else x)

    torch.manual_seed(0)
    net = Net(forward, a=conv(), b=conv(16), c=conv(16), d=conv(16))
    net.register_buffer("calls", torch.tensor(0))
    return net


def by_itself(one: RePr) -> None:
    """``apply_repr`` counts the steps."""


def test_the_same_as_schedule_and_scheme_put_together():
    schedule = RePrSchedule.derive(16, None, 3)
    net = readable_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    scheme = RePrScheme(find_filter_layers(net, ["*"]), optimizer, seed=4, model=net)
    expected, found = [], []
    for number in range(16):
        train(net, optimizer, steps=1)
        scheme.check()
        transition = (number in schedule.drop_iters) - (number in schedule.restore_iters)
        done = [scheme.drop, scheme.restore][transition < 0]() if transition else None
        expected.append((done and done.event, schedule.phase(number + 1)))

    def after(one):
        done = one.step()
        found.append((done and done.event, one.phase))

    one, applied = (begin(make, 16, schedule=None, seed=4) for make in (RePr, apply_repr))
    assert one.schedule == schedule and one.phase == "full"
    run(one, 16, after)
    assert found == expected and [event for event, _ in found].count("restore") == 3
    run(applied, 16, by_itself)
    assert applied.steps == 16
    assert_same_weights(one.model.state_dict(), net.state_dict())
    assert_same_weights(applied.model.state_dict(), net.state_dict())
    assert "apply_repr counts the optimizer's steps by itself" in refused(applied.step)
    applied.close()
    assert not applied.scheme.optimizers[0]._optimizer_step_post_hooks
    other = torch.optim.SGD(net.parameters(), 0.05)
    for both in ([optimizer, other], SimpleNamespace(first=optimizer, second=other)):
        assert "counts the steps of one optimizer, got 2: build RePr and call" in refused(apply_repr, net, both, 16)


@pytest.mark.parametrize("stop", [2, 4, 5, 8])
@pytest.mark.parametrize(
    ("make", "after", "build"),
    [(RePr, RePr.step, readable_net), (apply_repr, by_itself, readable_net), (RePr, RePr.step, skipping_net)],
)
def test_resumed_from_a_file_it_ends_with_the_same_weights(tmp_path, stop, make, after, build):
    def parts(one):
        return one.model, one.scheme.optimizers[0], one

    one = begin(make, kind=torch.optim.AdamW, build=build)
    run(one, stop, after)
    torch.save([part.state_dict() for part in parts(one)], tmp_path / "checkpoint.pth")
    run(one, 12 - stop, after)
    resumed = begin(make, kind=torch.optim.AdamW, build=build, seed=9)  # the seed comes with the state
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    for part, state in zip(parts(resumed), saved, strict=True):
        part.load_state_dict(state)
    assert resumed.steps == stop and resumed.phase == SCHEDULE.phase(stop)
    run(resumed, 12 - stop, after)
    assert_same_weights(resumed.model.state_dict(), one.model.state_dict())


def test_a_resumed_run_looks_at_the_batches_of_the_run_that_it_resumes():
    """Its seed comes with the state, as that of everything else."""

    def made(seed):
        net = readable_net()
        data = {"loader": DataLoader(IMAGES, 2, shuffle=True), "loss": lambda batch: net(batch).mean()}
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        return RePr(net, optimizer, 12, schedule=SCHEDULE, seed=seed, criterion="apoz", criterion_batches=1, **data)

    one, resumed = made(0), made(9)
    run(one, 1)
    for part, state in ((resumed.model, one.model.state_dict()), (resumed, one.state_dict())):
        part.load_state_dict(state)
    for each in (one, resumed):
        run(each, 2)
    assert one.scheme.num_dropped
    assert_same_weights(resumed.scheme.masks, one.scheme.masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(total_steps=0), "total_steps= must be an integer of at least 1, got 0"),
        (dict(total_steps=10.0), "total_steps= must be an integer of at least 1, got 10.0"),
        (dict(first_step=41), "first_step= must be 0 to total_steps= 40, got 41"),
        (dict(schedule=RePrSchedule(20, 10, 3)), "but total_steps= is 40"),
        (dict(loader=[1]), "give loader= and loss= together, or passes=, or none of them"),
        (dict(loader=[], loss=sum, criterion="apoz"), "loader= yields no batch"),
        (dict(loader=iter([1]), loss=sum), "loader= must start again whenever it is iterated"),
        (dict(loader=DataLoader([1], num_workers=1, persistent_workers=True), loss=sum), "without persistent_workers"),
        (dict(criterion="apoz"), "criterion= 'apoz' looks at training batches"),
        (dict(sample=torch.zeros(1, 5, 8, 8)), "sample= is not what the model can be called with: RuntimeError("),
        (dict(averages=[nn.Linear(1, 1)]), "averages= must be models with the parameters of the model"),
        (dict(averages=nn.Linear(1, 1)), "averages= must be a list, got Linear"),
        (dict(schedule=(20, 10, 1)), "schedule= must be of type RePrSchedule, got (20, 10, 1)"),
        (dict(first_lr_step=6.6), "first_lr_step= must be of type int, got 6.6"),
        (dict(seed=None), "seed= must be of type int, got None"),
        (dict(kind=lambda *_: {"generator": 0}), "optimizer= must be a torch.optim.Optimizer, or hold one"),
        (dict(ratio=0.3), f"RePr has no option 'ratio': take one of {', '.join(option_names())}"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(options, message):
    assert message in refused(begin, **{"total_steps": 40, **options})


@pytest.mark.parametrize(
    "options", [dict(sample=torch.zeros(1, 5, 8, 8)), dict(loader=[], loss=sum, criterion="apoz", warmup_iters=1)]
)
def test_a_refused_one_leaves_model_and_optimizer_alone(options):
    """Whoever sees its error, as in a notebook, has no object to close."""
    net = readable_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(UserError) as error:
        RePr(net, optimizer, 40, **options)
    hooks = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    for module in net.modules():
        hooks += [module._forward_hooks, module._forward_pre_hooks]
    assert not any(hooks)
    assert RePr(net, optimizer, 40) and error.tb  # which has the frames of the refused one


def test_what_participates_is_said_once_it_is_known(caplog):
    with caplog.at_level("INFO", "repr_det"):
        one = begin()
        assert not caplog.text and repr(one).startswith("RePr(step 0 of 12, full network, 0 of 48 filters in 3 convs")
        run(one, 3)
    assert caplog.text.count("RePr: 2 convs, 32 filters participate (norm: batch); every drop takes 9 (30 %)") == 1
    assert "RePr schedule: S1 3, S2 2, 2 cycles from iteration 0" in caplog.text
    assert "RePr drop after iteration 2 (cycle 1): 9 filters, mean O_f" in caplog.text


@pytest.mark.parametrize(("others", "is_little"), [(250, False), (500, True)])
def test_what_runs_later_is_announced_with_the_drop_and_counts(others, is_little, caplog):
    """Two tasks in turn: 2,736 of the weights that take part run in the first step, and 5,040 in the first two."""

    def forward(net, x):
        net.calls += 1
        return net.d([net.b, net.c][net.calls % 2](net.a(x).relu()).relu())

    net = Net(forward, a=conv(), b=conv(16), c=conv(16), d=conv(16), e=nn.Linear(others, others))
    net.calls = 0
    with caplog.at_level("INFO", "repr_det"):
        one = begin(build=lambda: net, schedule=RePrSchedule(5, 2, 1))
        run(one, 4)
        assert caplog.text.count("participate") == 1 and "RePr: 2 convs, 32 filters participate" in caplog.text
        run(one, 4)
    assert caplog.text.count("participate") == 2 and "RePr: 3 convs, 48 filters participate" in caplog.text
    assert caplog.text.count("every drop takes 14 ") == 1 and caplog.text.count("RePr schedule") == 1
    assert caplog.text.count("next to nothing to drop") == is_little


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILES)])
def test_a_model_that_trains_unseen_is_refused_in_the_first_step(compiled):
    """Compiled and run before; or its parts are called, not itself. A sample shows what the first cannot."""
    torch._dynamo.reset()
    net = readable_net()
    call = torch.compile(net, backend="aot_eager") if compiled else lambda x: net[6](net[3](net[0](x)))

    def step(one):
        call(IMAGES).square().mean().backward()
        one.scheme.optimizers[0].step()
        one.step()

    call(IMAGES).mean().backward()
    one = begin(build=lambda: net)
    assert "no pass of this model has been seen: give RePr the module that you call" in refused(step, one)
    one.close()
    one = begin(build=lambda: net, sample=IMAGES)
    for _ in range(4):
        step(one)
    assert one.phase == "sub"
    torch._dynamo.reset()


def test_next_to_nothing_to_drop_is_warned_of(caplog):
    for outputs in (3, 3000):
        assert not caplog.text
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, outputs))
        RePr(model, torch.optim.SGD(model.parameters(), 0.1), 12, sample=torch.randn(2, 1, 8, 8))
    assert "next to nothing to drop, 0.0 % of the trainable weights" in caplog.text


def test_a_sample_shows_what_participates_at_once_and_leaves_no_trace():
    net = readable_net()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    one = RePr(nn.DataParallel(net), torch.optim.SGD(net.parameters(), 0.1), 12, sample=IMAGES)
    assert one.model is net and [layer.norm for layer in one.scheme.layers] == [net[1], net[4]]
    assert_same_weights(net.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("make", [torch.jit.script, lambda part: torch.jit.trace(part, torch.ones(1, 16, 8, 8))])
def test_a_part_in_torchscript_is_seen_by_its_operations(make):
    net = readable_net()
    net[3] = make(nn.Sequential(net[3], net[4]))
    net[4] = nn.Identity()
    before = copy.deepcopy(net.state_dict())
    one = RePr(net, torch.optim.SGD(net.parameters(), 0.05), 12, schedule=SCHEDULE, sample=IMAGES)
    assert_same_weights(net.state_dict(), before)
    run(one, 5)
    assert one.scheme.cycle == 1 and [layer.name for layer in one.scheme.layers] == ["0"]


@pytest.mark.parametrize("filters", ["new", "old"])
def test_finish_ends_with_the_full_network(filters, caplog):
    gc.collect()  # loops of other tests
    caplog.clear()
    one = begin()
    run(one, 3)
    old, mask = one.scheme.state_dict()["old"]["0"]["weight"], one.scheme.masks["0"].clone()
    assert "filters= must be new or old, got 'other'" in refused(one.finish, "other")
    assert one.finish(filters).event == "restore" and one.finish(filters) is None
    assert torch.equal(one.model[0].weight[mask], old) == (filters == "old")
    run(one, 9)
    assert one.phase == "full" and one.scheme.cycle == 1 and one.steps == 12
    resumed = begin()
    resumed.load_state_dict(one.state_dict() | {"steps": 4})  # before the second drop of the schedule
    run(resumed, 1)
    del one, resumed
    gc.collect()
    assert "training ended" not in caplog.text


@pytest.mark.parametrize(("steps", "dropped", "beyond"), [(3, 9, 0), (15, 0, 1)])
def test_training_that_ends_in_the_sub_network_or_goes_on_beyond_its_end_is_warned_of(steps, dropped, beyond, caplog):
    one = begin()
    run(one, steps)
    one.close()
    del one
    gc.collect()
    assert (f"{dropped} filters are dropped (zero) in the model" in caplog.text) == (dropped > 0)
    assert caplog.text.count("step 13 is beyond the 12 of total_steps=") == beyond


def test_arguments_of_0_2_0_have_no_effect():
    with pytest.warns(DeprecationWarning, match="RePr: norms= has no effect since version 0.3.0"):
        begin(norms=True)


def test_averages_begin_again_at_a_restore_and_stay_at_a_drop():
    held, swa = (AveragedModel(readable_net(), use_buffers=True) for _ in range(2))
    one = begin(averages=[SimpleNamespace(ema=held.module), swa])  # as timm and Ultralytics keep one, and torch

    def after(one):
        for average in (held, swa):
            average.update_parameters(one.model)
        before = copy.deepcopy(held.module.state_dict())
        done = one.step()
        if done is not None and done.event == "restore":
            assert_same_weights(held.module.state_dict(), one.model.state_dict())
            assert_same_weights(swa.module.state_dict(), one.model.state_dict())
            assert swa.n_averaged == 0
        else:
            assert_same_weights(held.module.state_dict(), before)

    run(one, 8, after)
    assert one.scheme.cycle == 1 and one.phase == "sub"
    one.finish("old")
    assert_same_weights(held.module.state_dict(), one.model.state_dict())


@pytest.mark.parametrize("kind", ["average", "given", "nothing", "best", "trained"])
def test_an_average_that_is_not_given_is_warned_of_once(caplog, kind):
    """But no copy of the best model so far, and no second network that trains, as in CycleGAN or mutual learning."""
    average = AveragedModel(readable_net())
    optimizer = torch.optim.SGD(average.module.parameters() if kind == "trained" else [torch.ones(1)], 0.05)
    half_made = object.__new__(nn.Sequential)  # what is left of a module whose __init__ has failed
    lazy = nn.Sequential(nn.LazyLinear(3))  # somewhere in the program
    with torch.device("meta"):
        shapes = readable_net()

    def after(one):
        if kind == "best":
            average.module.load_state_dict(one.model.state_dict())
        elif kind == "trained":
            train(average.module, optimizer, steps=1)
            optimizer.zero_grad()
        elif kind != "nothing":
            average.update_parameters(one.model)
        one.step()

    run(begin(averages=[average] if kind == "given" else []), 10, after)
    assert caplog.text.count("a copy of the model (Sequential) is updated without gradients") == (kind == "average")
    assert not vars(half_made) and len(lazy) == 1 and shapes[0].weight.is_meta


@pytest.mark.parametrize(("milestone", "warned"), [(2, 1), (8, 1), (11, 0)])
def test_a_restore_behind_a_decay_of_the_rate_is_warned_of_once(caplog, milestone, warned):
    one = begin()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(one.scheme.optimizers[0], [milestone])
    run(one, 12, lambda one: (one.step(), scheduler.step()))
    assert caplog.text.count("the learning rate is 10 % of its initial one at this restore") == warned


@pytest.mark.parametrize(("first_step", "phases"), [(3, ["full"] * 4 + ["sub"]), (5, ["full"] * 2 + ["sub"] * 2)])
def test_what_lies_before_the_first_step_is_left_out(first_step, phases):
    one, seen = begin(first_step=first_step), []

    def after(one):
        one.step()
        seen.append(one.phase)

    run(one, len(phases), after)
    assert seen == phases and one.steps == first_step + len(phases)


@pytest.mark.parametrize("freed", [False, True])
def test_a_network_that_is_fixed_for_the_rest_of_a_step_learns(freed):
    """A discriminator, whose gradients are switched off while the generator trains, and freed before."""
    one = begin(returns="function_preserving")
    for _ in range(10):
        one.model.requires_grad_(True)
        train(one.model, one.scheme.optimizers[0], steps=1)
        one.model.requires_grad_(False)
        if freed:
            one.scheme.optimizers[0].zero_grad()
        one.step()
        assert one.scheme.not_silent in ([], ["6"])
    assert one.scheme.cycle == 2


@pytest.mark.parametrize("make", [RePr, apply_repr])
def test_an_optimizer_that_is_built_again_is_warned_of(caplog, make):
    one = begin(make, total_steps=60)
    run(one, 1, RePr.step if make is RePr else by_itself)
    other = torch.optim.SGD(one.model.parameters(), 0.01)
    for _ in range(45):
        train(one.model, other, steps=1)
        if make is RePr:
            one.step()
    steps = one.steps
    assert caplog.text.count("39 of 40 calls of step() came without a step of the optimizer") == (make is RePr)
    one.finish() if make is RePr else None
    del one
    gc.collect()
    due = f"training ended after {steps} steps of the optimizer, before 2 drops that its schedule has"
    assert (due in caplog.text) == (make is apply_repr)


@pytest.mark.parametrize("every", [1, 19, 25])
def test_a_call_once_an_epoch_is_warned_of_once(caplog, every):
    """With one optimizer a parameter, as in PyTorch's recipe of steps inside the backward pass."""
    one = begin(total_steps=100, kind=lambda parameters, rate: [torch.optim.SGD([x], rate) for x in parameters])
    calls = iter(range(1, 51))
    run(one, 50, lambda one: one.step() if next(calls) % every == 0 else None)
    one.close()
    run(one, 30, by_itself)
    assert caplog.text.count("20 steps without a call of step()") == (every == 25)
