"""How restored filters return: gamma, function-preserving, and the learning-rate warm-up after a restore."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.solver import build_lr_scheduler
from repr_det.method.blocks import readers
from test_slim import resnet
from torch import nn

from repr_det import RePrHook, Trainer
from repr_det.method.layers import find_filter_layers
from repr_det.method.passes import TrainingPasses
from repr_det.method.scheme import RePrScheme
from repr_det.studies.benchmarking.transitions import textbook_overlap


def trained_sub_network(depth, norm, returns, know_readers=True):
    """A scheme in the sub-network phase after some steps, so that momentum is there to be dealt with."""
    model = resnet(depth, norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    options = {"returns": returns, "readers": readers(model) if know_readers else None, "frozen_norm": "keep"}
    scheme = RePrScheme(find_filter_layers(model, ["*conv*"], ["stem*"]), optimizer, **options)
    batches = torch.randn(6, 2, 3, 48, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for number, batch in enumerate(batches):
        step(model, optimizer, batch)
        if number == 2:
            scheme.drop()
    return model, optimizer, scheme, batches[0]


def step(model, optimizer, batch):
    optimizer.zero_grad()
    sum((output**2).mean() for output in model(batch).values()).backward()
    optimizer.step()


def outputs(model, batch):
    """Of training and of evaluation mode; of copies, for training moves running statistics."""
    with torch.no_grad():
        return [output for mode in (True, False) for output in copy.deepcopy(model).train(mode)(batch).values()]


@pytest.mark.parametrize("depth", [18, 50])
def test_function_preserving_restore_changes_no_output_and_everything_learns(depth):
    model, optimizer, scheme, batch = trained_sub_network(depth, "BN", "function_preserving")
    dropped = {layer: mask for layer in scheme.layers if (mask := scheme.masks[layer.name]).any()}
    before = outputs(model, batch)
    scheme.restore()
    for a, b in zip(outputs(model, batch), before, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    restored = {layer: layer.weight[mask].clone() for layer, mask in dropped.items()}
    for layer, rows in restored.items():
        assert (rows.flatten(1).norm(dim=1) > 0).all(), layer.name
    for _ in range(3):
        step(model, optimizer, batch)
    changed = outputs(model, batch)
    assert any((a - b).abs().max() > 1e-6 * b.abs().max() for a, b in zip(changed, before, strict=True))
    for layer, rows in restored.items():
        moved = (layer.weight[dropped[layer]] - rows).flatten(1).abs().amax(1)
        assert (moved > 0).all(), layer.name  # every filter gets a gradient: none is dead


@pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.resnet50])
def test_torchvision_blocks_are_known_too(build):
    """A restore changes no output, and what is closed behind a norm that never adapts does not come back closed."""
    torch.manual_seed(0)
    net = build(num_classes=3).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    passes = TrainingPasses(net, lambda n, _: [images] * n, lambda batch: net(batch).square().mean(), torch.cat)
    closed = net.layer3[0].bn1
    with torch.no_grad():
        net(images)  # statistics to evaluate with
        closed.bias[[1, 6]] = -100.0
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    layers = find_filter_layers(net, ["layer*.conv*"])
    assert {layer.conv for layer in layers} == set(readers(net))
    options = {"returns": "function_preserving", "criterion": "redundant", "passes": passes, "readers": readers(net)}
    options |= {"criterion_batches": 1, "calibration_batches": 1}
    scheme = RePrScheme(layers, optimizer, **options)
    assert {1, 6} <= set(scheme.drop().dropped["layer3.0.conv1"])
    passes.loss(images).backward()
    optimizer.step()
    with torch.no_grad():
        before = net(images)
        scheme.restore()
        assert (net(images) - before).abs().max() <= 1e-12 * before.abs().max()
    seen = []
    closed.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    net(images)
    assert (seen[0][:, [1, 6]] > 0).any((0, 2, 3)).all()

    net.layer3[0].relu = nn.GELU()
    assert not {net.layer3[0].conv1, net.layer3[0].conv2} & set(readers(net))


def test_function_preserving_needs_the_momentum_of_the_readers_to_be_zero():
    _, optimizer, scheme, _ = trained_sub_network(50, "BN", "function_preserving")
    columns = [
        (reader, scheme.masks[layer.name].clone())
        for layer in scheme.layers
        if (reader := scheme.readers[layer.conv]) is not None and scheme.masks[layer.name].any()
    ]
    assert any(optimizer.state[reader.weight]["momentum_buffer"][:, mask].any() for reader, mask in columns)
    scheme.restore()
    for reader, mask in columns:
        assert not optimizer.state[reader.weight]["momentum_buffer"][:, mask].any()


@pytest.mark.parametrize("norm", ["FrozenBN", "GN", ""])
def test_function_preserving_with_other_norms_silences_readers(norm):
    model, _, scheme, batch = trained_sub_network(50, norm, "function_preserving")
    pairs = [
        (scheme.readers[layer.conv], mask)
        for layer in scheme.layers
        if (mask := scheme.masks[layer.name].clone()).any()
    ]
    own = {layer.conv: scheme.masks[layer.name].clone() for layer in scheme.layers}
    scheme.restore()
    assert sum(reader is not None for reader, _ in pairs) > 0
    for reader, mask in pairs:
        if reader is not None:
            assert not reader.weight[~own[reader]][:, mask].any()
    assert all(torch.isfinite(output).all() for output in outputs(model, batch))


def test_unknown_readers_return_as_published():
    ends = []
    for returns, know in (("function_preserving", False), ("as_published", True)):
        model, _, scheme, _ = trained_sub_network(18, "BN", returns, know)
        scheme.restore()
        ends.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_median_gamma():
    _, _, scheme, _ = trained_sub_network(18, "BN", "median_gamma")
    masks = {layer: scheme.masks[layer.name].clone() for layer in scheme.layers}
    wanted = {layer: sorted(layer.norm.weight[~mask].tolist()) for layer, mask in masks.items()}
    scheme.restore()
    for layer, mask in masks.items():
        expected = wanted[layer][(len(wanted[layer]) - 1) // 2]  # the lower one of two
        assert (layer.norm.weight[mask] == expected).all()


class Rates(HookBase):
    """Those with which the optimizer steps, and those of the schedule."""

    def before_train(self):
        self.used, self.stock = [], []
        self.trainer.optimizer.register_step_pre_hook(lambda opt, *_: self.used.append(opt.param_groups[0]["lr"]))

    def before_step(self):
        self.stock.append(self.trainer.optimizer.param_groups[0]["lr"])


def test_warm_up_after_every_restore(tiny_cfg, tmp_path):
    """The rates with which the optimizer steps; logs, schedule and checkpoints keep the stock ones."""

    opts = "SOLVER.MAX_ITER 12 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 2 REPR.NUM_CYCLES 2".split()
    opts += ["DATASETS.TEST", "()"]
    trainer = Trainer(tiny_cfg(*opts, "REPR.REINIT.WARMUP_ITERS", 3))
    rates = Rates()
    trainer.register_hooks([rates])
    trainer.train()
    plain = Trainer(tiny_cfg(*opts, "OUTPUT_DIR", tmp_path / "plain"))
    others = Rates()
    plain.register_hooks([others])
    plain.train()
    assert rates.stock == others.stock == others.used
    # Restores after iterations 3 and 7: 1/4, 2/4, 3/4 of the rate from 4 and from 8 on.
    shares = [1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25, 0.5, 0.75, 1]
    assert rates.used == pytest.approx([a * b for a, b in zip(shares, rates.stock, strict=True)])


class ClippingSGD(torch.optim.SGD):
    """As Detectron2's projects write it. A plain SGD exists too: RePrHook asks one for the schedule."""

    def step(self, closure=None):
        return super().step(closure)


class RatesAtTheWork(ClippingSGD):
    """The rates with which parameters are moved, behind all hooks."""

    def _init_group(self, group, *lists):
        self.used = [*getattr(self, "used", []), float(group["lr"])]
        return super()._init_group(group, *lists)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_warm_up_of_other_optimizers(tiny_cfg, tmp_path, rate, scheduled):
    """``step`` calls that of its base, or the rate is a tensor, which compiled optimizers keep."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 1))
    model = nn.ModuleDict({"net": net})
    model.forward = lambda x: {"loss": net(x).sigmoid().mean()}
    rate = rate.clone() if torch.is_tensor(rate) else rate
    opts = "SOLVER.MAX_ITER 16 SOLVER.WARMUP_ITERS 0 SOLVER.STEPS () REPR.S1_ITERS 3 REPR.S2_ITERS 3".split()
    opts += ["SOLVER.BASE_LR", 0.1, "REPR.ENABLED", True, "REPR.NUM_CYCLES", 1, "REPR.REINIT.WARMUP_ITERS", 3]
    cfg = tiny_cfg(*opts, "REPR.LAYERS.INCLUDE", ["net.0"])
    optimizer = RatesAtTheWork(model.parameters(), lr=rate)
    trainer = SimpleTrainer(model, 20 * [torch.randn(2, 3, 8, 8)], optimizer)
    trainer.register_hooks([RePrHook(cfg)])
    if scheduled:
        trainer.register_hooks([hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer))])
    trainer.train(0, 12)
    shares = [1, 1, 1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 1]
    assert optimizer.used == pytest.approx([0.1 * share for share in shares])
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert not torch.is_tensor(rate) or optimizer.param_groups[0]["lr"] is rate


def reparametrised(block, how):
    if how == "weight norm":
        nn.utils.parametrizations.weight_norm(block.conv2)
    elif how == "spectral norm":
        nn.utils.parametrizations.spectral_norm(block.conv2)
    else:
        block.conv2 = nn.Sequential(block.conv2, nn.Dropout2d(0.1))


@pytest.mark.parametrize("how", ["weight norm", "spectral norm", "another module"])
def test_a_reader_whose_kernels_cannot_be_silenced_is_named(how, caplog):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    reparametrised(model.layer1[0], how)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    layers = find_filter_layers(model, ["layer1.?.conv1"])
    scheme = RePrScheme(layers, optimizer, returns="function_preserving", readers=readers(model))
    assert scheme.loud == ["layer1.0.conv1"]
    assert "filters of layer1.0.conv1 cannot return without changing" in caplog.text
    scheme.drop()
    scheme.restore()


def test_no_warm_up_where_nothing_came_back_and_the_same_one_in_a_resumed_run(tiny_cfg, tmp_path):
    opts = "SOLVER.MAX_ITER 12 SOLVER.WARMUP_ITERS 0 SOLVER.STEPS () SOLVER.BASE_LR 0.001 REPR.ENABLED True".split()
    opts += "REPR.S1_ITERS 3 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1 REPR.REINIT.WARMUP_ITERS -1 DATASETS.TEST ()".split()

    def train(name, *own, until=12, resume=False):
        trainer, rates = Trainer(tiny_cfg(*opts, "OUTPUT_DIR", tmp_path / name, *own)), Rates()
        trainer.register_hooks([rates])
        trainer.resume_or_load(resume)
        trainer.max_iter = until
        trainer.train()
        (scheme,) = (hook.scheme for hook in trainer._hooks if isinstance(hook, RePrHook))
        return rates.used, scheme

    used, scheme = train("nothing", "REPR.CRITERION", "redundant")
    assert used == 12 * [0.001] and scheme.cycle == 1 and scheme.num_returned == 0  # stock training
    expected = [0.001 * share for share in (1, 1, 1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 1)]
    used, scheme = train("whole")
    assert used == pytest.approx(expected) and scheme.num_returned > 0
    state = scheme.state_dict()
    del state["returned"]  # of version 0.1.0
    scheme.load_state_dict(state)
    assert scheme.num_returned > 0

    first, _ = train("stopped", "SOLVER.CHECKPOINT_PERIOD", "7", until=7)
    second, _ = train("stopped", "SOLVER.CHECKPOINT_PERIOD", "7", resume=True)
    assert (len(first), first + second) == (7, pytest.approx(expected))


@pytest.mark.parametrize(
    "opts, length",
    [
        (["REPR.REINIT.WARMUP_ITERS", "0"], 0),
        (["REPR.REINIT.WARMUP_ITERS", "7"], 7),
        (["REPR.REINIT.WARMUP_ITERS", "-1"], 3),  # as long as the filters were out
        (["REPR.REINIT.WARMUP_ITERS", "-1", "REPR.S1_ITERS", "0", "REPR.S2_ITERS", "0"], None),  # derived phases
        (["REPR.REINIT.WARMUP_ITERS", "7", "SOLVER.REFERENCE_WORLD_SIZE", "2"], 14),
        (["REPR.REINIT.WARMUP_ITERS", "-1", "SOLVER.REFERENCE_WORLD_SIZE", "2"], 6),
    ],
)
def test_length_of_the_warm_up(tiny_cfg, opts, length):
    hook = RePrHook(tiny_cfg("REPR.ENABLED", "True", "REPR.S1_ITERS", "6", "REPR.S2_ITERS", "3", *opts))
    assert hook.warm_up_iters == (hook.schedule.s2_iters if length is None else length)
    assert length is not None or 0 < hook.schedule.s2_iters != 3


def overlaps_by_hand(rows):
    return textbook_overlap(rows.detach().flatten(1).numpy())


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("returns", ["as_published", "function_preserving"])
def test_overlaps_told_after_a_restore_are_those_of_the_weights(depth, returns):
    _, _, scheme, _ = trained_sub_network(depth, "BN", returns)
    kept = np.concatenate([overlaps_by_hand(x.weight[~scheme.masks[x.name]]) for x in scheme.layers])
    transition = scheme.restore()
    expected = np.concatenate([overlaps_by_hand(layer.weight) for layer in scheme.layers])
    told = np.concatenate([transition.overlaps[layer.name] for layer in scheme.layers])
    np.testing.assert_allclose(told, expected, atol=2e-6)  # told with 6 decimals
    assert transition.overlap_after == pytest.approx(expected.mean(), abs=1e-6)
    assert transition.overlap_before == pytest.approx(kept.mean(), abs=1e-6)
