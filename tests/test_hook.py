"""RePrHook in real Detectron2 trainers: stock behaviour when off (invariant 6), place, log, resume, schedule (8)."""

import argparse
import copy
import math
import re

import numpy as np
import pytest
import torch
from conftest import SCHEDULE, assert_same_weights, refused, trained
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, default_setup
from detectron2.modeling import build_model
from outcomes import json_lines
from small_loop import OPTIONS, TwoConvs, config, hook_of, small_trainer, spelled, train
from test_options import OTHERS

from repr_det import RePrHook, Trainer, UserError
from repr_det.commands.processes import STOCK_CONFIG_FILE, write_configs
from repr_det.detectron.config import options_of_config, without_repr
from repr_det.detectron.passes import training_passes
from repr_det.network.state import random_state

WAYS = ("config", "plain")


def zero_filters(model) -> int:
    """The number of filters of a layer that are zero, and their norm too."""
    layer = model.get_submodule("backbone.bottom_up.res3.0.conv1")
    return int(((layer.weight.flatten(1) == 0).all(1) & (layer.norm.weight == 0) & (layer.norm.bias == 0)).sum())


class Seen(HookBase):
    """``look(trainer)`` after every step."""

    def __init__(self, look):
        self.look, self.found = look, {}

    def after_step(self):
        self.found[self.trainer.iter] = self.look(self.trainer)


def state_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_changes_nothing_bit_for_bit_before_the_first_drop(tiny_cfg, tmp_path, enabled, norm):
    common = ["MODEL.RESNETS.NORM", norm, "SOLVER.BASE_LR", "0.0005", "SOLVER.MAX_ITER", 7, "DATASETS.TEST", "()"]
    late = ["REPR.START_ITER", 4, "REPR.S1_ITERS", 1, "REPR.S2_ITERS", 1, "REPR.NUM_CYCLES", 1]
    ours, stock = Seen(state_of), Seen(state_of)
    trained(tiny_cfg(*common, *late, "REPR.ENABLED", enabled), ours)
    cfg = without_repr(tiny_cfg(*common, "OUTPUT_DIR", tmp_path / "stock"))
    trained(cfg, stock, kind=DefaultTrainer)
    assert_same_weights(ours.found[3], stock.found[3])


def test_one_run(tiny_cfg, tmp_path):
    """Filters, events, scalars, the checkpoint of the sub-network and the config beside the run."""
    data = ["REPR.CRITERION", "apoz", "REPR.CRITERION_BATCHES", 2, "DATASETS.TEST", "()"]
    cfg = tiny_cfg(*SCHEDULE, *data, "SOLVER.CHECKPOINT_PERIOD", 2)
    seen = Seen(lambda trainer: zero_filters(trainer.model))
    trainer = trained(cfg, seen)
    assert [seen.found[i] > 0 for i in range(8)] == [False, True, False, False, True, False, False, False]

    events = json_lines(tmp_path / "run" / "repr_events.jsonl")
    when = [(1, "drop", 0), (2, "restore", 0), (4, "drop", 1), (5, "restore", 1)]
    assert [(e["iteration"], e["event"], e["cycle"]) for e in events] == when
    body = trainer.model.backbone.bottom_up
    filters = sum(m.out_channels for n, m in body.named_modules() if n[:3] == "res" and n[-5:-1] == "conv")
    dropped = math.floor(0.3 * filters)
    keys = set("iteration event cycle dropped overlap_before overlap_after max_cosine seconds".split())
    for event in events:
        assert sum(map(len, event["dropped"].values())) == dropped and event.keys() == keys
    # 3x3 convs have room for orthogonal filters: d >= J + M.
    assert events[1]["max_cosine"]["backbone.bottom_up.res2.0.conv1"] <= 1e-5
    assert events[1]["overlap_after"] < events[0]["overlap_before"]

    storage = trainer.storage.histories()
    assert [v for v, _ in storage["repr/phase"].values()] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert [v for v, _ in storage["repr/dropped_filters"].values()] == [0, 0, dropped, 0, 0, dropped, 0, 0]
    # Extra passes leave no trace in the log.
    assert {len(storage[name].values()) for name in ("rpn/num_pos_anchors", "total_loss")} == {8}

    path = tmp_path / "run" / "model_0000001.pth"  # after the drop; stock Detectron2 takes it
    saved = torch.load(path, weights_only=True)
    stock = build_model(without_repr(cfg))
    assert saved["thing_classes"] == ["blue", "green"] and saved["model"].keys() == stock.state_dict().keys()
    assert set(DetectionCheckpointer(stock).load(str(path))) <= {"trainer", "iteration", "thing_classes"}
    write_configs(cfg, tmp_path)
    config = get_cfg()
    config.merge_from_file(str(tmp_path / STOCK_CONFIG_FILE))
    assert "REPR" not in config and config.SOLVER.MAX_ITER == 8


def test_in_a_stock_trainer_it_moves_and_logs(tiny_cfg, tmp_path):
    """Checkpoint and evaluation of the iteration of the drop see the sub-network, and log.txt tells of it."""
    cfg = tiny_cfg(*SCHEDULE, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)
    layers = []

    class Evaluated(DefaultTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            layers.append(zero_filters(model))
            return {}

    default_setup(cfg, argparse.Namespace())
    trained(cfg, RePrHook(seed=1, **vars(options_of_config(cfg))), kind=Evaluated)
    saved = torch.load(tmp_path / "run" / "model_0000001.pth", weights_only=True)
    masks = saved["trainer"]["hooks"]["RePrHook"]["scheme"]["masks"]
    assert masks and not any(saved["model"][f"{name}.weight"][mask].any() for name, mask in masks.items())
    assert [zero > 0 for zero in layers] == [True, False, False, False]  # after iterations 1, 3, 5 and 7
    log = (tmp_path / "run" / "log.txt").read_text()
    lines = {"convs, ": 1, "RePr schedule: S1 2, S2 1": 1, "RePr drop after iteration ": 2, "RePr restore after": 2}
    assert {line: log.count(line) for line in lines} == lines


@pytest.mark.parametrize("way", WAYS)
def test_every_option_by_plain_arguments_and_by_a_config(way):
    chosen = OTHERS | {"layers": ["backbone.conv?"], "criterion": "apoz", "frozen_norm": "recalibrate", "num_cycles": 2}
    hook = hook_of(way, 20, **chosen)
    train(small_trainer(hook, steps=20, norm="FrozenBN"))
    assert vars(hook.options) == vars(hook.repr.options) == chosen and hook.scheme.cycle == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({}, 6, "{s2_iters} 2) = 6 iterations and then some of the full network, but {total_steps} is 6"),
        ({"criterion": "orto"}, 8, "{criterion} must be one of apoz, "),
        ({"layers": ["nothing*"]}, 8, "{layers} ['nothing*'] matches no trainable Conv2d; the closest"),
        ({"layers": ["head"]}, 8, "no filter can be dropped of the convs that {layers} names: head (its channels le"),
    ],
)
def test_wrong_options_are_refused_before_the_first_step_by_the_names_that_were_written(way, options, steps, message):
    line = refused(lambda: train(small_trainer(hook_of(way, steps, **(OPTIONS | options)), steps=steps), stop=1))
    assert spelled(message, way) in line


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["s1_iters", "drop_ratio", "layers"])
def test_a_resumed_run_must_have_the_same_options(way, name):
    trainer, other = (small_trainer(hook_of(way, 20, **OPTIONS | more)) for more in ({}, {name: OTHERS[name]}))
    train(trainer, stop=5)  # in the sub-network phase
    line = refused(other.load_state_dict, trainer.state_dict())
    was = getattr(trainer._hooks[0].options, name)
    was = list(was) if isinstance(was, tuple) else was
    assert spelled(f"trained with {{{name}}} {was}, this run has {OTHERS[name]}", way) in line


def test_a_resumed_run_begins_where_its_state_was_and_may_have_other_batches():
    """Unless an option says it, their size decides how many of them a transition looks at."""
    trainer, larger = (small_trainer(RePrHook(**OPTIONS, images_per_batch=n), norm="FrozenBN") for n in (4, 8))
    train(trainer, stop=5)
    larger.model.load_state_dict(trainer.model.state_dict())
    larger.load_state_dict(trainer.state_dict())
    assert "iteration 2 is not in cycle 0 of RePr, sub phase, where this trainer is" in refused(train, larger, 2)
    train(larger, 5)
    assert larger._hooks[0].scheme.cycle == 1


@pytest.mark.parametrize(("name", "wrong"), [("seed", None), ("images_per_batch", "8"), ("total_steps", 8.0)])
def test_an_argument_of_another_type_is_refused(name, wrong):
    assert f"{name}= must be of type int, got {wrong!r}" in refused(RePrHook, **OPTIONS, **{name: wrong})


def test_a_second_hook_is_refused_and_one_without_a_seed_draws_none_from_the_trainings():
    hook = RePrHook(**OPTIONS)
    trainer = small_trainer(RePrHook(**OPTIONS))
    del trainer.optimizer
    assert "needs a trainer with the attributes model and optimizer: 'SimpleTrainer' ob" in refused(trainer.train, 0, 8)
    assert "registered twice in this trainer" in refused(train, small_trainer(hook, RePrHook(**OPTIONS)))
    np.random.seed(3)
    train(small_trainer(hook))
    assert np.random.rand() == np.random.RandomState(3).rand()


def test_arguments_beside_a_config():
    trainer = small_trainer()
    average = copy.deepcopy(trainer.model)
    hook = RePrHook(config(**OPTIONS), averages=[average], scale="old")
    trainer.register_hooks([hook])
    train(trainer, stop=6)  # behind the restore, at which averages begin again
    assert hook.options.scale == "old"
    assert torch.equal(trainer.model.backbone.conv1.weight, average.backbone.conv1.weight)


def first_ones(layer):
    return -torch.arange(layer.num_filters)


def test_a_function_as_criterion():
    trainer, other = small_trainer(RePrHook(**OPTIONS, criterion=first_ones)), small_trainer(RePrHook(**OPTIONS))
    train(trainer, stop=5)
    masks = trainer._hooks[0].scheme.masks
    found = {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
    assert found == {"backbone.conv1": [0, 1, 2, 3], "backbone.conv2": [0, 1, 2]}
    assert "criterion= test_hook.first_ones, this run has ortho" in refused(other.load_state_dict, trainer.state_dict())


def test_reference_world_size_scales_the_schedule(tiny_cfg):
    cfg = tiny_cfg(*SCHEDULE, "SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.IMS_PER_BATCH", "4", "REPR.START_ITER", "1")
    hook = RePrHook(cfg)
    assert (hook.schedule.start_iter, hook.schedule.s1_iters, hook.schedule.s2_iters) == (2, 4, 2)
    assert Trainer(cfg).cfg.SOLVER.MAX_ITER == 16


def test_batches_of_extra_passes_depend_on_seed_and_cycle_alone(tiny_cfg):
    cfg = tiny_cfg()
    trainer = DefaultTrainer(cfg)
    state = str(random_state())

    def files(seed, cycle, images=2):
        passes = training_passes(trainer.model, trainer, seed, images)
        return [[image["file_name"] for image in batch] for batch in passes.batches(2, cycle)]

    assert files(3, 0) == files(3, 0) != files(3, 1)
    assert files(3, 0) != files(4, 0) and files(2**32 - 1, 0) != files(2**64, 0)
    assert [len(batch) for batch in files(3, 0, 4)] == [4, 4]
    assert str(random_state()) == state
    # Calibration of FrozenBN looks at eight images.
    for images, batches in ((None, 4), (1, 8), (3, 3), (8, 1), (10, 1)):
        assert training_passes(trainer.model, trainer, 0, images).calibration_batches == batches

    def name(image):
        return {"file_name": image["file_name"]}

    # One that is not grouped by shape, which takes width and height.
    trainer._trainer.data_loader = build_detection_train_loader(cfg, mapper=name, aspect_ratio_grouping=False)
    assert files(3, 0) == files(3, 0)


class TensorLoss(TwoConvs):
    def forward(self, images):
        return super().forward(images)["loss"]


class Branches(TwoConvs):
    """Called as semi-supervised trainers do."""

    def forward(self, images, branch):
        return super().forward(images)


class BranchTrainer(SimpleTrainer):
    def run_step(self):
        loss = self.model(next(self._data_loader_iter), branch="supervised")["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize(("model", "kind"), [(TensorLoss, SimpleTrainer), (Branches, BranchTrainer)])
def test_models_that_are_called_in_another_way(model, kind, norm, caplog):
    """Without a pass of the hook's own the first step shows what participates."""
    trainer = small_trainer(RePrHook(**OPTIONS), norm=norm)
    trainer.model.__class__, trainer.__class__ = model, kind
    if (model, norm) == (Branches, "FrozenBN"):
        with pytest.raises(UserError, match=r"transitions look at training batches, and no .*, TypeError"):
            train(trainer)
        return
    train(trainer)
    assert trainer._hooks[0].scheme.cycle == 1
    assert ("; the step shows what participates" in caplog.text) == (model is Branches)


def test_a_network_that_diverges_is_named_as_such_at_a_transition(tiny_cfg):
    """Weights are finite, boxes are not: Detectron2 raises FloatingPointError, here between two steps."""

    def blow(trainer):
        if trainer.iter == 1:
            trainer.model.proposal_generator.rpn_head.anchor_deltas.weight.data.fill_(3e38)

    trainer = Trainer(tiny_cfg(*SCHEDULE, "REPR.CRITERION", "redundant", "DATASETS.TEST", "()"))
    trainer.register_hooks([Seen(blow)])
    trainer._hooks.insert(0, trainer._hooks.pop())
    assert re.search(r"in a pass of a transition: .* has diverged\. Lower the", refused(trainer.train))
