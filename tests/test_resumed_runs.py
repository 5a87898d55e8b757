"""Around resuming: the order of registration and of hooks, settings that change, data of the user's own, evaluators,
the record of a run."""

import json
import os
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_weights, refused
from detectron2 import evaluation
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.solver import build_lr_scheduler
from outcomes import json_lines
from small_loop import config as small_config
from small_loop import small_trainer, train
from torch import nn
from torch.utils.data import DataLoader

from repr_det import RePrHook, UserError
from repr_det.commands.data import check_same_classes
from repr_det.datasets import class_names
from repr_det.detectron import evaluators
from repr_det.detectron.hook import first_later_hook
from repr_det.runs.checkpoints import AtomicCheckpointer
from repr_det.runs.record import DATA_FILE, RunRecord
from repr_det.runs.resume import apply_settings, settings_of


def config(folder, *opts):
    """Drops after iterations 1 and 5, restores after 3 and 7."""
    cfg = small_config(12, s1_iters=2, s2_iters=2, num_cycles=2, layers=["backbone.conv*"])
    cfg.merge_from_list(["OUTPUT_DIR", str(folder), *opts])
    return cfg


def trained(folder, cfg, stop=None, resume=False, front=(), loader=None, norm="BN"):
    os.makedirs(folder, exist_ok=True)
    trainer = small_trainer(*front, steps=12, norm=norm, rate=0.1)
    trainer.checkpointer = AtomicCheckpointer(trainer.model, str(folder), trainer=weakref.proxy(trainer))
    trainer.register_hooks([RePrHook(cfg)])
    trainer.start_iter = trainer.checkpointer.resume_or_load("", resume=resume).get("iteration", -1) + 1
    if loader is None:  # passes of transitions begin at its beginning
        trainer._data_loader_iter_obj = iter(trainer.data_loader[trainer.start_iter :])
    else:
        trainer.data_loader = loader
    train(trainer, trainer.start_iter, stop)
    trainer.checkpointer.save("last", iteration=(stop or 12) - 1)
    return trainer.model.state_dict()


def events(folder):
    lines = json_lines(folder / "repr_events.jsonl")
    return [(line["iteration"], line["event"], line["cycle"]) for line in lines]


ALL = [(1, "drop", 0), (3, "restore", 0), (5, "drop", 1), (7, "restore", 1)]


def test_a_trainer_that_trains_again_goes_on_or_is_refused(tmp_path):
    trainer = small_trainer(RePrHook(config(tmp_path)), steps=12)
    trainer.train(0, 10)
    assert "iteration 0 is not in cycle 2 of RePr" in refused(trainer.train, 0, 10)
    trainer.train(10, 12)
    with pytest.raises(UserError, match="is not in cycle 0 of RePr, full phase, where this trainer is: load a check"):
        small_trainer(RePrHook(config(tmp_path)), steps=12).train(3, 12)  # registered after the state was loaded
    assert events(tmp_path) == ALL


@pytest.mark.parametrize(("at", "norm"), [(1, "BN"), (7, "BN"), (2, "FrozenBN"), (4, "FrozenBN")])
def test_saved_in_front_of_the_transition_of_the_same_iteration(tmp_path, at, norm):
    """After 1 and 7 the next drop or restore is owed, and made when the run is resumed."""
    straight = trained(tmp_path / "straight", config(tmp_path / "straight"), norm=norm)
    cfg = config(tmp_path / "run")

    class SaveInFront(HookBase):
        def after_step(self):
            if self.trainer.iter == at:
                self.trainer.checkpointer.save(f"mine_{at}", iteration=at)

    trained(tmp_path / "run", cfg, at + 1, front=[SaveInFront()], norm=norm)
    (tmp_path / "run" / "last_checkpoint").write_text(f"mine_{at}.pth")
    assert_same_weights(trained(tmp_path / "run", cfg, resume=True, norm=norm), straight)
    assert events(tmp_path / "run") == ALL


def test_place_before_everything_that_saves(tmp_path):
    checkpointer = AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path))
    timer, best, mine = hooks.IterationTimer(), hooks.BestCheckpointer(2, checkpointer, "bbox/AP"), HookBase()
    mine.saver = checkpointer
    assert first_later_hook([timer, best]) == first_later_hook([timer, mine, best]) == 1
    assert first_later_hook([timer, hooks.LRScheduler()]) == 2


def test_data_that_a_transition_needs_is_missed_before_the_first_step(tmp_path):
    def once():
        yield pytest.fail("a step was made")

    for loader in (once(), DataLoader([0], num_workers=1, persistent_workers=True)):
        with pytest.raises(UserError, match="this trainer's data loader must start again whenever it is iterated"):
            trained(tmp_path, config(tmp_path), norm="FrozenBN", loader=loader)
    with pytest.raises(UserError, match=r"look at training batches, and no training batch passes .*, StopIteration"):
        trained(tmp_path, config(tmp_path, "REPR.CRITERION", "apoz"), loader=[])


def stepped(steps, rate=0.001, decay=6, **options):
    """Optimizer and scheduler of a config after so many steps."""
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.WARMUP_ITERS", 4, "SOLVER.STEPS", (decay,), "SOLVER.MAX_ITER", 20])
    net = nn.Linear(2, 2)
    groups = [{"params": [net.weight]}, {"params": [net.bias], "weight_decay": 0.0, "lr": 2 * rate}]
    optimizer = torch.optim.SGD(groups, rate, **{"momentum": 0.9, "weight_decay": 1e-4, **options})
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


OTHER = {"rate": 0.005, "weight_decay": 0.01, "momentum": 0.8}
TOLD = ["initial_lr 0.001 -> 0.005", "weight_decay 0.0001 -> 0.01", "momentum 0.9 -> 0.8", "initial_lr 0.002 -> 0.01"]


@pytest.mark.parametrize("steps", [2, 5, 9])  # in the warm-up, after it, after a decay
@pytest.mark.parametrize(("opts", "told"), [({}, []), (OTHER, TOLD), ({"decay": 2}, [])])
def test_settings_of_a_resumed_run_are_those_of_its_config(steps, opts, told):
    old, old_scheduler = stepped(steps)
    optimizer, scheduler = stepped(0, **opts)
    built = settings_of(optimizer)
    scheduler.load_state_dict(old_scheduler.state_dict())
    optimizer.load_state_dict(old.state_dict())
    rates = [[group["lr"] for group in one.param_groups] for one in (old, stepped(steps, **opts)[0])]
    told = [*told, *(f"lr {a:g} -> {b:g}" for a, b in zip(*rates, strict=True) if a != b)]
    assert sorted(apply_settings(optimizer, scheduler, built, None)) == sorted(told)
    for later in range(3):
        wanted, _ = stepped(steps + later, **opts)
        for a, b in zip(optimizer.param_groups, wanted.param_groups, strict=True):
            for key in ("lr", "momentum", "weight_decay"):
                assert a[key] == b[key]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("base", "told"), [(0.85, []), (0.8, ["base_momentum 0.85 -> 0.8"])])
def test_settings_that_a_scheduler_moves_are_not_those_of_the_config(base, told):
    def cycle(lowest):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1, 0.9)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 20, base_momentum=lowest)

    (old, old_scheduler), (optimizer, scheduler) = cycle(0.85), cycle(base)
    before, built = settings_of(old), settings_of(optimizer)
    for _ in range(3):
        old.step()
        old_scheduler.step()
    scheduler.load_state_dict(old_scheduler.state_dict())
    optimizer.load_state_dict(old.state_dict())
    assert apply_settings(optimizer, scheduler, built, before) == told
    assert optimizer.param_groups[0]["momentum"] == old.param_groups[0]["momentum"] < 0.95


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

    def begin(text, start):
        record = RunRecord(lambda folder: (folder / "config.yaml").write_text(text))
        cfg = SimpleNamespace(OUTPUT_DIR=str(run), DATASETS=SimpleNamespace(TRAIN=[data_set], TEST=[]))
        record.trainer = SimpleNamespace(start_iter=start, max_iter=6, cfg=cfg)
        record.before_train()
        return {path.name: path.read_text() for path in run.iterdir() if path.suffix == ".yaml"}

    assert begin("lr 1", 0) == {"config.yaml": "lr 1"}
    about = json.loads((run / DATA_FILE).read_text())[data_set]
    wanted = dict(file=str(tmp_path / "data.json"), image_root="images", classes=["a", "b"], images=3)
    assert about.pop("sha256") and about == wanted
    assert begin("lr 1", 5) == {"config.yaml": "lr 1"}
    assert not caplog.records
    assert begin("lr 2", 6) == {"config.yaml": "lr 2", "config_until_0000005.yaml": "lr 1"}
    assert begin("lr 3", 6) == {"config.yaml": "lr 3", "config_until_0000005.yaml": "lr 1"}  # no step with lr 2 is left
    assert "The run so far had another config.yaml: its record is kept as *_until_0000005.*" in caplog.text
    assert all((run / f"processes{name}.json").read_text() == "1\n" for name in ("", "_until_0000005"))
    MetadataCatalog.get(data_set).thing_classes = ["b", "A"]  # as LVIS: neither names nor order of the json
    begin("lr 3", 6)
    check_same_classes(class_names(data_set), run)


@pytest.mark.parametrize(("kind", "evaluator"), [("sem_seg", "SemSeg"), ("pascal_voc", "PascalVOCDetection")])
def test_evaluator_of_a_data_set(tmp_path, data_set, monkeypatch, kind, evaluator):
    """Other kinds than COCO, which test_classes tests."""
    monkeypatch.setattr(evaluation, f"{evaluator}Evaluator", lambda *_, **__: evaluator)
    MetadataCatalog.get(data_set).evaluator_type = kind
    evaluators.check_evaluators([data_set])
    assert evaluators.build_evaluator(data_set, str(tmp_path), get_cfg()) == evaluator


@pytest.mark.parametrize(("kind", "told"), [("lvis", "needs the package lvis"), ("my_own", "none of coco, sem_seg")])
def test_a_data_set_that_cannot_be_evaluated_is_refused_before_the_run(data_set, kind, told, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    MetadataCatalog.get(data_set).evaluator_type = kind
    assert told in refused(evaluators.check_evaluators, [data_set])
