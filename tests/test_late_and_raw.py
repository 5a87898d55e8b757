"""What used to be told late, raw or not at all around resuming: the order of registration and of hooks, settings that
change, data of the user's own, evaluators, the record of a run. A detector of one conv keeps it fast."""

import json
import logging
import os
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import At, assert_same_weights, interrupt
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.solver import build_lr_scheduler
from small_loop import TwoConvs, batch
from small_loop import config as small_config
from torch import nn

from repr_det import RePrHook, UserError
from repr_det.detectron import evaluators
from repr_det.detectron.evaluators import build_evaluator, check_evaluators
from repr_det.detectron.hook import first_later_hook
from repr_det.runs.checkpoints import AtomicCheckpointer
from repr_det.runs.record import DATA_FILE, RunRecord
from repr_det.runs.resume import apply_settings


def config(folder, *opts):
    """Drops after iterations 1 and 5, restores after 3 and 7."""
    cfg = small_config(12, s1_iters=2, s2_iters=2, num_cycles=2, layers=["backbone.conv*"])
    cfg.merge_from_list(["OUTPUT_DIR", str(folder), *opts])
    return cfg


class From:
    """Batches from ``start`` on, as often as they are asked for."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        return map(batch, range(self.start, 12))


class SaveInFront(HookBase):
    """A checkpoint hook of the user's own, which knows nothing of transitions."""

    def __init__(self, at):
        self.at = at

    def after_step(self):
        if self.trainer.iter in self.at:
            self.trainer.checkpointer.save(f"mine_{self.trainer.iter}", iteration=self.trainer.iter)


def trained(folder, cfg, stop=12, resume=False, late=False, front=(), loader=From, norm="BN"):
    """Trains up to iteration ``stop``; late: RePrHook is registered after the checkpoint is loaded."""
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(1)
    model = TwoConvs(norm)
    trainer = SimpleTrainer(model, None, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    trainer.checkpointer = AtomicCheckpointer(model, str(folder), trainer=weakref.proxy(trainer))
    trainer.register_hooks(front)
    if not late:
        trainer.register_hooks([RePrHook(cfg)])
    start = trainer.checkpointer.resume_or_load("", resume=resume).get("iteration", -1) + 1
    if late:
        trainer.register_hooks([RePrHook(cfg)])
    trainer.data_loader = loader(start)
    trainer.start_iter = start
    if stop < 12:
        trainer.register_hooks([At(stop, interrupt)])
    with pytest.raises(KeyboardInterrupt) if stop < 12 else nullcontext():
        trainer.train(start, 12)
    trainer.checkpointer.save("last", iteration=stop - 1)
    return {name: value.clone() for name, value in model.state_dict().items()}


def events(folder):
    lines = [json.loads(line) for line in (Path(folder) / "repr_events.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["event"], line["cycle"]) for line in lines]


ALL = [(1, "drop", 0), (3, "restore", 0), (5, "drop", 1), (7, "restore", 1)]


@pytest.fixture
def straight(tmp_path):
    return trained(tmp_path / "straight", config(tmp_path / "straight"))


def test_a_trainer_that_trains_again_goes_on_or_is_refused(tmp_path):
    model = TwoConvs()
    trainer = SimpleTrainer(model, From(0), torch.optim.SGD(model.parameters(), 0.1))
    trainer.register_hooks([RePrHook(config(tmp_path))])
    trainer.train(0, 10)
    with pytest.raises(UserError, match="iteration 0 is not in cycle 2 of RePr"):
        trainer.train(0, 10)
    trainer.train(10, 12)
    assert events(tmp_path) == ALL


@pytest.mark.parametrize("stop", [2, 5])  # behind a drop, behind a restore
def test_hook_registered_after_the_checkpoint_was_loaded(tmp_path, stop):
    cfg = config(tmp_path / "run")
    trained(tmp_path / "run", cfg, stop)
    before = events(tmp_path / "run")
    with pytest.raises(
        UserError, match="is not in cycle 0 of RePr, full phase, where this trainer is: load a checkpoint"
    ):
        trained(tmp_path / "run", cfg, resume=True, late=True)
    assert events(tmp_path / "run") == before


@pytest.mark.parametrize("at", [1, 7])  # a drop, a restore
def test_saved_in_front_of_the_transition_of_the_same_iteration(tmp_path, straight, at):
    """The next drop or restore is owed, and made when the run is resumed."""
    cfg = config(tmp_path / "run")
    trained(tmp_path / "run", cfg, at + 1, front=[SaveInFront([at])])
    (tmp_path / "run" / "last_checkpoint").write_text(f"mine_{at}.pth")
    assert_same_weights(trained(tmp_path / "run", cfg, resume=True), straight)
    assert events(tmp_path / "run") == ALL


def test_place_before_everything_that_saves(tmp_path):
    class Mine(HookBase):
        def __init__(self, checkpointer):
            self.saver = checkpointer

    checkpointer = AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path))
    timer, best = hooks.IterationTimer(), hooks.BestCheckpointer(2, checkpointer, "bbox/AP")
    assert first_later_hook([timer, best]) == first_later_hook([timer, Mine(checkpointer), best]) == 1
    assert first_later_hook([timer, hooks.LRScheduler()]) == 2


def test_data_that_a_transition_needs_is_missed_before_the_first_step(tmp_path):
    def once(start):
        yield pytest.fail("a step was made")

    with pytest.raises(UserError, match="this trainer's data loader is an iterator"):
        trained(tmp_path, config(tmp_path), norm="FrozenBN", loader=once)
    with pytest.raises(UserError, match="the criterion looks at training batches, and none can be drawn"):
        trained(tmp_path, config(tmp_path, "REPR.CRITERION", "apoz"), loader=lambda start: [])
    trained(tmp_path, config(tmp_path), norm="FrozenBN")  # calibrated on this loader
    assert events(tmp_path) == ALL


def stepped(steps, *opts):
    """Optimizer and scheduler of a config after so many steps."""
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.WARMUP_ITERS", 4, "SOLVER.STEPS", (6,), "SOLVER.MAX_ITER", 20, *opts])
    net = nn.Linear(2, 2)
    groups = [{"params": [net.weight]}, {"params": [net.bias], "weight_decay": 0.0, "lr": 2 * cfg.SOLVER.BASE_LR}]
    decay, momentum = cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.MOMENTUM
    optimizer = torch.optim.SGD(groups, cfg.SOLVER.BASE_LR, momentum=momentum, weight_decay=decay)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


OTHER = ["SOLVER.BASE_LR", 0.005, "SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.MOMENTUM", 0.8]
TOLD = ["initial_lr 0.001 -> 0.005", "weight_decay 0.0001 -> 0.01", "momentum 0.9 -> 0.8", "initial_lr 0.002 -> 0.01"]


@pytest.mark.parametrize("steps", [2, 5, 9])  # in the warm-up, after it, after a decay
@pytest.mark.parametrize(("opts", "told"), [([], []), (OTHER, TOLD)])
def test_settings_of_a_resumed_run_are_those_of_its_config(steps, opts, told):
    old, old_scheduler = stepped(steps)
    optimizer, scheduler = stepped(0, *opts)
    built = [dict(group) for group in optimizer.param_groups]
    scheduler.load_state_dict(old_scheduler.state_dict())
    optimizer.load_state_dict(old.state_dict())
    assert sorted(apply_settings(optimizer, scheduler, built)) == sorted(told)
    for later in range(3):
        wanted, _ = stepped(steps + later, *opts)
        for a, b in zip(optimizer.param_groups, wanted.param_groups, strict=True):
            for key in ("lr", "momentum", "weight_decay"):
                assert a[key] == (pytest.approx(b[key], rel=1e-12) if later == 0 else b[key])
        optimizer.step()
        scheduler.step()


@pytest.fixture
def data_set(tmp_path):
    content = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)], "annotations": []}
    content["categories"] = [{"id": 5, "name": "b"}, {"id": 2, "name": "a"}]
    (tmp_path / "data.json").write_text(json.dumps(content))
    name = f"record_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: [{}] * 3)
    MetadataCatalog.get(name).set(json_file=str(tmp_path / "data.json"), image_root="images")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_record_of_a_run(tmp_path, data_set, caplog):
    run = tmp_path / "run"
    run.mkdir()

    def begin(text, start, end=9):
        record = RunRecord(str(run), lambda folder: (folder / "config.yaml").write_text(text), [data_set])
        trainer = SimpleTrainer(nn.Linear(1, 1), [], None)
        trainer.start_iter, trainer.max_iter = start, end
        trainer.register_hooks([record])
        with caplog.at_level(logging.WARNING, "repr_det.resume"):
            record.before_train()
        return {path.name: path.read_text() for path in run.iterdir() if path.suffix == ".yaml"}

    assert begin("lr 1", 0) == {"config.yaml": "lr 1"}
    told = json.loads((run / DATA_FILE).read_text())[data_set]
    assert told.pop("sha256") and told == {
        "file": str(tmp_path / "data.json"), "image_root": "images", "classes": ["a", "b"], "images": 3
    }  # fmt: skip
    assert begin("lr 1", 5) == {"config.yaml": "lr 1"}
    assert begin("lr 2", 9) == {"config.yaml": "lr 1"}  # nothing left to train
    assert not caplog.records
    assert begin("lr 2", 6) == {"config.yaml": "lr 2", "config_until_0000005.yaml": "lr 1"}
    assert "config.yaml is not that of the run so far" in caplog.text
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "config_until_0000005.yaml", DATA_FILE]


VOC = ("pascal_voc", "PascalVOCDetectionEvaluator")


@pytest.mark.parametrize(
    ("kind", "expected"), [(None, "CocoEvaluator"), ("coco", "CocoEvaluator"), ("sem_seg", "SemSegEvaluator"), VOC]
)
def test_evaluator_of_a_data_set(tmp_path, data_set, monkeypatch, kind, expected):
    from detectron2 import evaluation

    made = []
    owner = evaluators if expected == "CocoEvaluator" else evaluation
    monkeypatch.setattr(owner, expected, lambda *_, **__: made.append(expected))
    if kind is not None:
        MetadataCatalog.get(data_set).evaluator_type = kind
    check_evaluators([data_set])
    build_evaluator(data_set, str(tmp_path))
    assert made == [expected]


@pytest.mark.parametrize(("kind", "told"), [("lvis", "needs the package lvis"), ("my_own", "none of coco, sem_seg")])
def test_a_data_set_that_cannot_be_evaluated_is_refused_before_the_run(data_set, kind, told, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    MetadataCatalog.get(data_set).evaluator_type = kind
    with pytest.raises(UserError, match=told):
        check_evaluators([data_set])
