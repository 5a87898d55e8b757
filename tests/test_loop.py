"""RePr in one object: against the pieces it is made of, resumed anywhere, and what it refuses."""

import copy
import gc
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from repr_det import RePr, RePrSchedule, RePrScheme, UserError, apply_repr, find_filter_layers
from repr_det.method.loop import passes_over

STEPS = 16  # three quarters are 12: 3 cycles of S1 2 and S2 1 (a cycle of 4 in thirds)
SCHEDULE = RePrSchedule(3, 2, 2)  # drops after 2 and 7, restores after 4 and 9


def net(norm=nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def data(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 1, 8, 8, generator=draw), torch.randint(3, (6,), generator=draw)) for _ in range(number)]


def built(norm=nn.BatchNorm2d, cls=torch.optim.SGD, **keys):
    model = net(norm)
    model(data(1)[0][0])
    return model, cls(model.parameters(), 0.05, weight_decay=0.01, **keys)


def train(model, optimizer, batches, after=lambda: None):
    for images, classes in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()
        after()


def weights(model) -> torch.Tensor:
    return torch.cat([t.detach().flatten().double() for t in model.state_dict().values()])


def test_the_same_as_schedule_and_scheme_put_together():
    model, optimizer = built(momentum=0.9)
    schedule = RePrSchedule.derive(STEPS, None, 3)
    scheme = RePrScheme(find_filter_layers(model, ["*"]), optimizer, seed=4, model=model)
    for number, batch in enumerate(data(STEPS)):
        train(model, optimizer, [batch])
        scheme.check()
        if number in schedule.drop_iters:
            scheme.drop()
        elif number in schedule.restore_iters:
            scheme.restore()
    wanted = weights(model)

    model, optimizer = built(momentum=0.9)
    one = RePr(model, optimizer, STEPS, seed=4)
    assert one.schedule == schedule
    phases, events = [], []

    def after():
        if (transition := one.step()) is not None:
            events.append((one.steps - 1, transition.event))
        phases.append(one.phase)

    assert one.phase == "full"
    train(model, optimizer, data(STEPS), after)
    assert torch.equal(weights(model), wanted)
    expected = [*((i, "drop") for i in schedule.drop_iters), *((i, "restore") for i in schedule.restore_iters)]
    assert events == sorted(expected)
    assert phases == [schedule.phase(i + 1) for i in range(STEPS)]

    model, optimizer = built(momentum=0.9)
    applied = apply_repr(model, optimizer, STEPS, seed=4)
    train(model, optimizer, data(STEPS))
    assert torch.equal(weights(model), wanted) and applied.steps == STEPS


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("apply", [False, True])
def test_resumed_from_a_file_it_ends_with_the_same_weights(tmp_path, stop, apply):
    def begin():
        model, optimizer = built(cls=torch.optim.AdamW)
        one = (apply_repr if apply else RePr)(model, optimizer, 12, schedule=SCHEDULE)
        return model, optimizer, one, (lambda: None) if apply else one.step

    model, optimizer, one, after = begin()
    batches = data(12)
    train(model, optimizer, batches[:stop], after)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "repr": one.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pth")
    train(model, optimizer, batches[stop:], after)
    wanted = weights(model)

    model, optimizer, one, after = begin()
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    one.load_state_dict(state["repr"])
    assert one.steps == stop and one.phase == SCHEDULE.phase(stop)
    train(model, optimizer, batches[stop:], after)
    assert torch.equal(weights(model), wanted)


@pytest.mark.parametrize("norm", [torchvision.ops.FrozenBatchNorm2d, nn.BatchNorm2d])
def test_loader_and_loss_feed_frozen_norms_and_criteria(norm):
    """torchvision's FrozenBN: buffers 0 while dropped, and moments behind the norm as before the drop once restored."""
    model, optimizer = built(norm)
    if norm is torchvision.ops.FrozenBatchNorm2d:
        with torch.no_grad():
            model[1].weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
            model[1].bias.normal_(generator=torch.Generator().manual_seed(3))
    batches = data(4)
    options = dict(loader=batches, loss=lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    one = RePr(model, optimizer, 12, schedule=SCHEDULE, criterion="apoz", calibration_batches=4, **options)
    images = torch.cat([x for x, _ in batches])

    def moments():
        out = model[1](model[0](images)).detach()
        return torch.stack([out.mean((0, 2, 3)), out.std((0, 2, 3), unbiased=False)])

    before = moments()
    train(model, torch.optim.SGD(model.parameters(), 0.0), data(1), one.step)  # weights stay as they are
    one.step(), one.step()
    gone = one.scheme.masks["0"].nonzero().flatten()
    assert len(gone) and model[1](model[0](images))[:, gone].count_nonzero() == 0
    one.step(), one.step()
    if norm is torchvision.ops.FrozenBatchNorm2d:
        torch.testing.assert_close(moments(), before, rtol=1e-4, atol=1e-4)


def test_frozen_norm_without_data_is_refused_at_the_first_step_or_the_sample():
    for keys in ({}, {"sample": data(1)[0][0]}):
        model, optimizer = built(torchvision.ops.FrozenBatchNorm2d)
        with pytest.raises(UserError, match="FrozenBN re-calibration looks at training batches"):
            train(model, optimizer, data(1), RePr(model, optimizer, 12, **keys).step)
    model, optimizer = built(torchvision.ops.FrozenBatchNorm2d)
    train(model, optimizer, data(1), RePr(model, optimizer, 12, frozen_norm="keep").step)


@pytest.mark.parametrize("own_generator", [False, True])
def test_passes_leave_the_loader_of_the_training_alone(own_generator):
    generator = torch.Generator().manual_seed(5) if own_generator else None
    loader = DataLoader(TensorDataset(torch.arange(40)), 4, shuffle=True, generator=generator)
    passes = passes_over(nn.ReLU(), loader, sum, seed=3)
    torch.manual_seed(6)
    training = iter(loader)
    seen = [next(training)[0].tolist() for _ in range(3)]
    drawn = random.getstate(), torch.get_rng_state()
    first = [batch[0].tolist() for batch in passes.batches(2, 0)]
    assert first == [batch[0].tolist() for batch in passes.batches(2, 0)]
    assert first != [batch[0].tolist() for batch in passes.batches(2, 1)]
    assert random.getstate() == drawn[0] and torch.equal(torch.get_rng_state(), drawn[1])
    rest = seen + [batch[0].tolist() for batch in training]
    assert sorted(itertools.chain.from_iterable(rest)) == list(range(40))
    torch.manual_seed(6)
    if own_generator:
        generator.manual_seed(5)
    assert [batch[0].tolist() for batch in loader] == rest


def test_ddp_is_looked_through(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, optimizer = built()
        wrapped = DistributedDataParallel(model)
        one = RePr(wrapped, optimizer, 12, schedule=SCHEDULE)
        assert [layer.name for layer in one.scheme.layers] == ["0", "3"]
        train(wrapped, optimizer, data(4), one.step)
        assert one.phase == "sub"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (dict(total_steps=0), "total_steps= must be an integer of at least 1, got 0"),
        (dict(first_step=41), "first_step= must be 0 to total_steps= 40, got 41"),
        (dict(total_steps=10.0), "total_steps= must be an integer of at least 1, got 10.0"),
        (dict(total_steps=5), "num_cycles= 3 cycles of S1 and S2 do not fit"),
        (dict(schedule=RePrSchedule(20, 10, 3)), "but total_steps= is 40"),
        (dict(layers=["backbone.*"]), "layers= ['backbone.*'] matches no trainable Conv2d"),
        (dict(loader=[1]), "give loader= and loss= together, or passes=, or none of them"),
        (dict(loader=[], loss=sum, criterion="apoz"), "loader= yields no batch"),
        (dict(sample=torch.zeros(1, 5, 8, 8)), "sample= is not what the model can be called with: RuntimeError: "),
        (dict(loss=sum), "give loader= and loss= together"),
        (dict(loader=iter([1]), loss=sum), "loader= must start again whenever it is iterated"),
        (dict(criterion="apoz"), "criterion= 'apoz' looks at training batches"),
        (dict(criterion="nope"), "criterion= must be one of"),
        (dict(layers="backbone.*"), "layers= must be a list of patterns, got 'backbone.*'"),
        (dict(exclude="head"), "exclude= must be a list of patterns, got 'head'"),
        (dict(ratio=0.3), "RePr has no option 'ratio': take one of s1_iters, "),
        (dict(drop_ratio=1.5), "drop_ratio= must be in (0, 1), got 1.5"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(keys, line):
    model, optimizer = built()
    with pytest.raises(UserError) as error:
        RePr(model, optimizer, **{"total_steps": 40, **keys})
    assert line in str(error.value) and "\n" not in str(error.value)


def test_the_state_of_another_schedule_is_refused():
    model, optimizer = built()
    state = RePr(model, optimizer, 40).state_dict()
    with pytest.raises(
        UserError, match=r"trained with RePrSchedule\(s1_iters=6.*this run has RePrSchedule\(s1_iters=3"
    ):
        RePr(model, optimizer, 12, schedule=SCHEDULE).load_state_dict(state)


def test_a_loader_that_keeps_its_workers_is_refused():
    loader = DataLoader(TensorDataset(torch.arange(4)), num_workers=1, persistent_workers=True)
    with pytest.raises(UserError, match="without persistent_workers"):
        passes_over(nn.ReLU(), loader, sum)


def test_who_takes_part_is_said_once_it_is_known(caplog):
    model, optimizer = built()
    with caplog.at_level("INFO", "repr_det"):
        one = RePr(model, optimizer, 12, schedule=SCHEDULE)
        assert not caplog.text and repr(one).startswith("RePr(step 0 of 12, full network, 0 of 20 filters in 2 convs")
        train(model, optimizer, data(3), one.step)
    assert caplog.text.count("RePr: 2 convs, 20 filters take part (norm: batch, none); every drop takes 6 (30 %)") == 1
    assert "RePr schedule: S1 3, S2 2, 2 cycles from iteration 0" in caplog.text
    assert "RePr drop after iteration 2 (cycle 1): 6 filters, mean O_f" in caplog.text


@pytest.mark.parametrize("outputs", [3, 3000])
def test_next_to_nothing_to_drop_is_warned_of(outputs, caplog):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, outputs))
    RePr(model, torch.optim.SGD(model.parameters(), 0.1), 12, sample=torch.randn(2, 1, 8, 8))
    assert ("next to nothing to drop, 0.0 % of the trainable weights" in caplog.text) == (outputs == 3000)


def test_a_sample_shows_who_takes_part_at_once_and_leaves_no_trace():
    model, optimizer = built()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    one = RePr(model, optimizer, 12, sample=data(1)[0][0])
    assert [layer.norm for layer in one.scheme.layers] == [model[1], None]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("filters", ["new", "old"])
def test_finish_ends_with_the_full_network(filters, caplog):
    model, optimizer = built()
    one = RePr(model, optimizer, 12, schedule=SCHEDULE)
    train(model, optimizer, data(3), one.step)
    old = one.scheme.state_dict()["old"]["0"]["weight"]
    rows = one.scheme.masks["0"].clone()
    with pytest.raises(UserError, match="filters= must be new or old, got 'other'"):
        one.finish("other")
    assert one.finish(filters).event == "restore" and one.finish(filters) is None
    assert torch.equal(model[0].weight[rows], old) == (filters == "old")
    train(model, optimizer, data(9), one.step)
    assert one.phase == "full" and one.scheme.cycle == 1 and one.steps == 12


def test_training_that_ends_in_the_sub_network_is_warned_of(caplog):
    for steps, told in ((3, True), (5, False)):
        model, optimizer = built()
        one = RePr(model, optimizer, 12, schedule=SCHEDULE)
        train(model, optimizer, data(steps), one.step)
        dropped = one.scheme.num_dropped
        caplog.clear()
        one.close()
        del one
        gc.collect()
        assert (f"{dropped} filters are dropped (zero) in the model" in caplog.text) == told


def test_steps_beyond_the_total_are_warned_of_once(caplog):
    model, optimizer = built()
    one = RePr(model, optimizer, 12, schedule=SCHEDULE)
    train(model, optimizer, data(15), one.step)
    assert caplog.text.count("step 13 is beyond the 12 of total_steps=") == 1


def test_apply_repr_counts_by_itself():
    model, optimizer = built()
    applied = apply_repr(model, optimizer, 12)
    with pytest.raises(UserError, match="apply_repr counts the optimizer's steps by itself"):
        applied.step()


@pytest.mark.parametrize("name", ["norms", "slim"])
def test_arguments_of_0_2_0_have_no_effect(name):
    model, optimizer = built()
    with pytest.warns(DeprecationWarning, match=f"RePr: {name}= has no effect since version 0.3.0"):
        RePr(model, optimizer, 12, **{name: True})


class Exponential:
    """An average of the weights, as timm and Ultralytics keep it."""

    def __init__(self, model) -> None:
        self.module = copy.deepcopy(model)

    def update(self, model) -> None:
        for mine, theirs in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mine.lerp_(theirs, 0.1) if mine.is_floating_point() else mine.copy_(theirs)


def test_averages_begin_again_at_a_restore_and_stay_at_a_drop():
    model, optimizer = built()
    average = Exponential(model)
    swa = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    one = RePr(model, optimizer, 12, schedule=SCHEDULE, averages=[average, swa])

    def after():
        average.update(model)
        swa.update_parameters(model)
        before = weights(average.module)
        done = one.step()
        if done is not None and done.event == "drop":
            assert torch.equal(weights(average.module), before)
        if done is not None and done.event == "restore":
            assert all(torch.equal(weights(other.module), weights(model)) for other in (average, swa))
            assert swa.n_averaged == 0

    train(model, optimizer, data(6), after)
    assert one.scheme.cycle == 1 and not torch.equal(weights(average.module), weights(model))
    before = weights(average.module)
    train(model, optimizer, data(2), one.step)
    one.finish("old")
    assert torch.equal(weights(average.module), before)
    one.close()
    with pytest.raises(UserError, match="averages= must be models with the parameters of the model"):
        RePr(model, optimizer, 12, averages=[nn.Linear(1, 1)])


@pytest.mark.parametrize(("given", "moves"), [(False, True), (False, False), (True, True)])
def test_an_average_that_is_not_given_is_warned_of_once(caplog, given, moves):
    model, optimizer = built()
    average = Exponential(model)
    half_made = object.__new__(type(model))  # what is left of a module whose __init__ has failed
    lazy = nn.Sequential(nn.LazyLinear(3))  # somewhere in the program
    one = RePr(model, optimizer, 12, schedule=SCHEDULE, averages=[average] if given else [])

    def after():
        if moves:
            average.update(model)
        one.step()

    train(model, optimizer, data(10), after)
    warned = caplog.text.count("a copy of the model (Sequential) is updated without gradients")
    assert warned == (moves and not given) and not vars(half_made) and len(lazy) == 1


def test_what_lies_before_the_first_step_is_left_out():
    for first_step, phases in ((3, ["full"] * 4 + ["sub"]), (5, ["full"] * 2 + ["sub"] * 2)):
        model, optimizer = built()
        one = RePr(model, optimizer, 12, schedule=SCHEDULE, first_step=first_step)
        seen = []
        train(model, optimizer, data(len(phases)), lambda one=one, seen=seen: seen.append((one.step(), one.phase)[1]))
        assert seen == phases and one.steps == first_step + len(phases)


@pytest.mark.parametrize("every", [1, 19, 25])
def test_a_call_once_an_epoch_is_warned_of_once(caplog, every):
    model, optimizer = built()
    one = RePr(model, optimizer, 100, schedule=SCHEDULE)
    for number in range(1, 51):
        train(model, optimizer, data(1), one.step if number % every == 0 else lambda: None)
    one.close()
    train(model, optimizer, data(30), lambda: None)
    assert caplog.text.count("20 steps without a call of step()") == (every == 25)
