"""REPR.SLIM auto: which way is chosen, by which clock or count, and that choosing leaves no trace."""

import copy
import functools
import json
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from detectron2.config import get_cfg
from plain_nets import IMAGES, loss_of, plain_net, plain_scheme
from torch import nn

from repr_det import RePr, RePrSchedule, RePrScheme, UserError, add_repr_config, find_filter_layers
from repr_det.detectron.config import validate_repr_config
from repr_det.method import slim_choice
from repr_det.method.slim import _SlimCall
from repr_det.method.slim_choice import Choice, by_clock


class Clock:
    """Stands in for ``seconds_of``: runs the passes, and says how long they took by whether they were slim."""

    def __init__(self, net: nn.Module, slim: float, masked: float) -> None:
        self.net, self.slim, self.masked, self.calls = net, slim, masked, []

    def __call__(self, function, device):
        function()
        self.calls.append(is_slim(self.net))
        return self.slim if self.calls[-1] else self.masked


def is_slim(net: nn.Module) -> bool:
    return any(isinstance(module._compiled_call_impl, _SlimCall) for module in net.modules())


def dropped(**options):
    """A net in its sub-network phase; 16 filters of 48 kept or so, so that slices are smaller than the whole."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Dropout(0.3))
    net.append(nn.Conv2d(48, 16, 3, padding=1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    options = {"slim_model": net, "drop_ratio": 0.5, **options}
    scheme = RePrScheme(find_filter_layers(net, ["0"]), optimizer, **options)
    scheme.drop()
    return net, optimizer, scheme


def step(net, optimizer, images=IMAGES) -> None:
    optimizer.zero_grad()
    loss_of(net, images).backward()
    optimizer.step()


@pytest.fixture
def gpu(monkeypatch):
    """The clock decides, as on a GPU."""
    monkeypatch.setattr(slim_choice, "by_clock", lambda network: True)


@pytest.mark.parametrize(("slim", "masked", "wanted"), [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_the_faster_is_kept_and_told(gpu, monkeypatch, caplog, slim, masked, wanted):
    net, optimizer, scheme = dropped()
    clock = Clock(net, slim, masked)
    monkeypatch.setattr(slim_choice, "seconds_of", clock)
    with caplog.at_level("INFO"):
        step(net, optimizer)
    assert is_slim(net) == wanted
    assert sum(clock.calls) == len(clock.calls) / 2 and clock.calls[:4] == [False, True, True, False]  # in turn
    name, other = ("slim", "masked") if wanted else ("masked", "slim")
    assert (
        f"the sub-network is computed {name} by clock: 1 against 2 s" in caplog.text
        and f"0.500 of {other}" in caplog.text
    )
    step(net, optimizer)
    assert len(clock.calls) == 14  # decided once
    transition = scheme.restore()
    assert transition.slim == {"slim": wanted, "by": "clock", "slim_cost": slim, "masked_cost": masked}
    scheme.drop()
    assert is_slim(net) == wanted and scheme.slim_choice is None  # kept in the next cycle
    step(net, optimizer)
    assert len(clock.calls) == 14 and scheme.restore().slim is None


@pytest.mark.parametrize("choose", [True, False])
def test_timing_leaves_no_trace(gpu, monkeypatch, choose):
    """Weights, statistics, momentum and random state of steps with a timing before the first are those without."""
    found = {}
    for slim in (choose, "auto"):
        net, optimizer, _ = dropped(slim=slim)
        monkeypatch.setattr(slim_choice, "seconds_of", Clock(net, *((1, 2) if choose else (2, 1))))
        torch.manual_seed(5)  # dropout draws from it
        for _ in range(2):
            step(net, optimizer)
        momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
        found[slim] = [*net.state_dict().values(), *momentum, torch.get_rng_state()]
    assert len(found["auto"]) == len(found[choose]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def test_what_the_model_returns_is_searched_for_losses(gpu, monkeypatch):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain_net()
            self.apart = []

        def forward(self, batch, scale=1):
            self.apart.append(inside)
            out = self.net(batch["image"])
            batch.pop("image")  # what a model may do with its own batch
            return {"losses": [out.mean() * scale, (out.square().mean(), 3)], "ids": torch.ones(2)}

    inside = []

    class Apart:
        def __enter__(self):
            inside.append(1)

        def __exit__(self, *_):
            inside.pop()

    net = Detector()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheme = RePrScheme(find_filter_layers(net, ["*"]), optimizer, slim_model=net, apart=Apart)
    scheme.drop()
    monkeypatch.setattr(slim_choice, "seconds_of", Clock(net, 1.0, 2.0))
    net({"image": IMAGES}, scale=2)["losses"][0].backward()
    assert scheme.slim_choice == Choice(True, "clock", 1.0, 2.0)


def test_passes_that_fail_leave_the_default(gpu, monkeypatch, caplog):
    net, optimizer, scheme = dropped()

    def out_of_memory(function, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(slim_choice, "seconds_of", out_of_memory)
    step(net, optimizer)
    assert scheme.slim_choice == Choice(True, "default") and is_slim(net)
    assert "cannot be timed: CUDA out of memory" in caplog.text


def test_evaluation_and_frozen_passes_decide_nothing(gpu, monkeypatch):
    net, _, scheme = dropped()
    monkeypatch.setattr(slim_choice, "seconds_of", Clock(net, 2.0, 1.0))
    net.eval()(IMAGES)
    with torch.no_grad():
        net.train()(IMAGES)
    copy.deepcopy(net)(IMAGES)
    assert scheme.slim_choice is None and is_slim(net)
    assert scheme.restore().slim is None


def test_a_cpu_counts_and_two_runs_agree():
    """A share of dropped filters that saves nothing, and one that does; whatever the clock says."""
    for images, ratio, kept, wanted in ((IMAGES[:1, :, :2, :2], 0.2, 56, False), (IMAGES, 0.5, 32, True)):
        ends = []
        for _ in range(2):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 16, 1))
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            scheme = RePrScheme(find_filter_layers(net, ["1"]), optimizer, drop_ratio=ratio, slim_model=net)
            scheme.drop()
            for _ in range(3):
                step(net, optimizer, images)
            ends.append((scheme.slim_choice, copy.deepcopy(net.state_dict())))
            # What the conv needs by hand: 56 (52 of 64 in multiples of 8) or 32 filters of 64 x 9 weights.
            places, part, whole = images[:, 0].numel(), kept * 576, 64 * 576
            slim = 6 * places * part + 11 * 4 * (14 * part + 4 * part + 2 * whole + 2 * places * (64 + 5 * kept))
            masked = 6 * places * whole + 11 * 4 * 14 * whole
            assert (scheme.slim_choice.slim_cost, scheme.slim_choice.masked_cost) == pytest.approx((slim, masked))
            assert scheme.slim_choice.slim == is_slim(net) == wanted == (slim <= masked)
        assert ends[0][0] == ends[1][0]
        assert all(torch.equal(ends[0][1][name], value) for name, value in ends[1][1].items())


def test_checkpointed_activations_are_computed_again_in_the_same_way(monkeypatch):
    """Masked is chosen in the first pass, whose backward pass runs its convs once more."""
    monkeypatch.setattr(slim_choice, "OPERATIONS_PER_BYTE", 1e6)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain_net()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    net = Net()
    net.net[0] = nn.Conv2d(3, 32, 3, padding=1)
    net.net[1], net.net[3] = nn.BatchNorm2d(32), nn.Conv2d(32, 16, 3, padding=1)
    net, optimizer, scheme = plain_scheme(net, slim_model=net)
    scheme.drop()
    step(net, optimizer)
    assert scheme.slim_choice.slim is False
    step(net, optimizer)
    assert not is_slim(net)


def test_a_resumed_run_keeps_the_choice(gpu, monkeypatch, tmp_path):
    for slim, masked in ((1.0, 2.0), (2.0, 1.0)):
        net, optimizer, scheme = dropped()
        monkeypatch.setattr(slim_choice, "seconds_of", Clock(net, slim, masked))
        step(net, optimizer)
        torch.save({"net": net.state_dict(), "scheme": scheme.state_dict()}, tmp_path / "saved.pth")
        saved = torch.load(tmp_path / "saved.pth", weights_only=True)
        other, theirs, resumed = dropped()
        resumed._release()
        clock = Clock(other, masked, slim)  # would choose the other way
        monkeypatch.setattr(slim_choice, "seconds_of", clock)
        other.load_state_dict(saved["net"])
        resumed.load_state_dict(saved["scheme"])
        step(other, theirs)
        assert is_slim(other) == (slim < masked) and not clock.calls
        assert resumed.restore().slim == scheme.restore().slim


def test_a_checkpoint_from_before_the_choice_was_slim(gpu):
    net, _, scheme = dropped()
    state = scheme.state_dict()
    del state["slim"], state["slim_choice"]
    scheme.load_state_dict(state)
    step(net, scheme.optimizer)
    assert is_slim(net) and scheme.slim_choice is None and scheme.state_dict()["slim"] is True


@pytest.mark.parametrize("slim", [True, False])
def test_the_config_is_stronger_than_the_checkpoint(slim):
    net, optimizer, scheme = dropped(slim=slim)
    scheme.load_state_dict({**scheme.state_dict(), "slim": not slim})
    step(net, optimizer)
    assert is_slim(net) == slim and scheme.slim_choice is None


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    told = {}
    for way in ("clock", "count"):
        slim_choice.by_clock = lambda network, way=way: way == "clock"
        net, optimizer, scheme = dropped()
        # Rank 0 alone would keep slim; together masked is faster.
        slim_choice.seconds_of = Clock(net, *((1.0, 2.0) if rank == 0 else (9.0, 1.0)))
        step(net, optimizer, IMAGES.repeat(1 + 3 * rank, 1, 1, 1))
        told[way] = [scheme.slim_choice.slim, scheme.slim_choice.slim_cost, scheme.slim_choice.masked_cost]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(told, file)
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_choose_alike(tmp_path):
    context = multiprocessing.get_context("spawn")  # a fork of a process whose OpenMP threads have run hangs
    processes = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0]["clock"] == [False, 5.0, 1.5]


def test_under_autocast_the_passes_are_those_of_the_step(gpu, monkeypatch):
    net, _, _ = dropped()
    types = []
    net[-1].register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    monkeypatch.setattr(slim_choice, "seconds_of", Clock(net, 1.0, 2.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(IMAGES).float().mean()
    loss.backward()
    assert set(types) == {torch.bfloat16} and len(types) == 15


def test_a_clock_decides_where_runs_may_differ():
    scheme = dropped()[2]
    assert not by_clock(scheme._slim)
    network = copy.copy(scheme._slim)
    network.layers = [type("Layer", (), {"weight": type("Weight", (), {"is_cuda": True})})]
    assert by_clock(network)
    torch.use_deterministic_algorithms(True)
    try:
        assert not by_clock(network)
    finally:
        torch.use_deterministic_algorithms(False)


def config(*opts):
    cfg = get_cfg()
    add_repr_config(cfg)
    cfg.merge_from_list(["REPR.ENABLED", True, "SOLVER.MAX_ITER", 90000, *opts])
    return cfg


def test_the_key_takes_auto_true_and_false_in_any_order(tmp_path):
    assert config().REPR.SLIM == "auto" and config("REPR.SLIM", "True").REPR.SLIM is True
    cfg = config("REPR.SLIM", False, "REPR.SLIM", "auto", "REPR.SLIM", True)
    validate_repr_config(cfg)
    (tmp_path / "old.yaml").write_text("REPR:\n  SLIM: false\n")
    cfg.merge_from_file(str(tmp_path / "old.yaml"))
    assert cfg.REPR.SLIM is False and cfg.clone().REPR.SLIM is False
    (tmp_path / "again.yaml").write_text(cfg.dump())
    again = config()
    again.merge_from_file(str(tmp_path / "again.yaml"))
    assert again.REPR == cfg.REPR and "SLIM: false" in cfg.dump() and "SLIM: auto" in config().dump()
    again.freeze()
    assert copy.deepcopy(again).REPR.SLIM is False


@pytest.mark.parametrize("value", ["Auto", "fast", 1, "None"])
def test_any_other_value_is_one_line(value):
    with pytest.raises(UserError, match=r"REPR\.SLIM must be auto, True or False, got"):
        validate_repr_config(config("REPR.SLIM", value))


def test_the_plain_loop_takes_the_same_values():
    make = functools.partial(RePr, schedule=RePrSchedule(2, 1, 1), layers=["0", "3"])
    for slim in ("auto", True, False):
        net = plain_net()
        make(net, torch.optim.SGD(net.parameters(), 0.1), 9, slim=slim)
    with pytest.raises(UserError, match=r"REPR\.SLIM must be auto, True or False, got 'always'"):
        make(net, torch.optim.SGD(net.parameters(), 0.1), 9, slim="always")
