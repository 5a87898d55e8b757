"""WandbWriter in wandb's offline mode: what arrives in the run, and that a resumed run goes on in it."""

import json
import sys

import pytest
from conftest import SMALL, refused
from detectron2.utils.events import EventStorage
from small_loop import config

from repr_det import UserError
from repr_det.commands.train import start
from repr_det.detectron.trackers import WandbWriter
from repr_det.runs.files import truncate_log

EVENTS = [
    dict(iteration=3, event="drop", cycle=0, dropped={"a": [1], "b": []}, overlap_before=0.5, overlap_after=0.25),
    dict(iteration=5, event="restore", cycle=0, dropped={"a": [1], "b": []}, overlap_before=0.3, overlap_after=0.125),
]


@pytest.fixture
def cfg(tmp_path):
    cfg = config(steps=8)
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    return cfg


@pytest.fixture
def wandb(monkeypatch):
    """Weights & Biases, offline."""
    module = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    module.teardown()  # it reads them once in a process
    return module


@pytest.fixture
def arrived(monkeypatch, wandb):
    """(run id, step, values) of everything that is logged."""
    found, log = [], wandb.Run.log

    def spy(run, values, step):
        found.append((run.id, step, values))
        log(run, values, step=step)

    monkeypatch.setattr(wandb.Run, "log", spy)
    return found


def run(writer, folder, begin, end, writes=True):
    """Iterations that log a loss and make transitions; the writer writes after every second one."""
    for name in ("repr_events.jsonl", "repr_overlaps.jsonl"):
        truncate_log(folder / name, begin)
    with EventStorage(begin) as storage:
        for iteration in range(begin, end):
            storage.iter = iteration
            storage.put_scalar("total_loss", 10.0 - iteration, smoothing_hint=False)
            for event in EVENTS:
                if event["iteration"] == iteration:
                    overlap = {"iteration": iteration, "overlap": {"a": [0.1, 0.9], "b": [0.2, 0.3]}}
                    for name, line in (("events", event), ("overlaps", overlap)):
                        with open(folder / f"repr_{name}.jsonl", "a") as file:
                            file.write(json.dumps(line) + "\n")
            if writes and iteration % 2:
                writer.write()


def test_config_scalars_and_transitions(cfg, tmp_path, arrived):
    writer = WandbWriter(cfg, project="test")
    assert writer._run.config["REPR"]["DROP_RATIO"] == 0.3 and writer._run.config["SOLVER"]["MAX_ITER"] == 8
    run(writer, tmp_path / "run", 0, 8)
    writer.close()
    assert [(step, next(iter(values))) for _, step, values in arrived] == [
        (1, "total_loss"), (3, "repr/drop_iteration"), (3, "total_loss"), (5, "repr/restore_iteration"),
        (5, "total_loss"), (7, "total_loss"),
    ]  # fmt: skip
    assert [values["total_loss"] for *_, values in arrived if "total_loss" in values] == [9.0, 7.0, 5.0, 3.0]
    drop, restore = arrived[1][2], arrived[3][2]
    assert drop["repr/drop_filters"] == 1 and restore["repr/restore_overlap_after"] == 0.125
    assert sum(drop["repr/drop_overlap"].histogram) == sum(restore["repr/restore_overlap"].histogram) == 4
    assert list((tmp_path / "run").rglob("*.wandb"))


@pytest.mark.parametrize("written", [False, True])
def test_a_drop_before_the_kill_arrives_once(cfg, tmp_path, arrived, written):
    """Killed before or after the writer has sent it, and resumed from a checkpoint before it: it is made again."""
    for begin, end, writes in ((0, 6, written), (2, 8, True)):
        writer = WandbWriter(cfg)
        run(writer, tmp_path / "run", begin, end, writes)
        writer.close()
    transitions = [(step, list(values)[1]) for _, step, values in arrived if "total_loss" not in values]
    assert transitions == [(3, "repr/drop_filters"), (5, "repr/restore_filters")]
    assert len({one for one, *_ in arrived}) == 1


def test_train_with_wandb(tiny_data, tmp_path, arrived):
    schedule = "REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 1 REPR.NUM_CYCLES 1 SOLVER.MAX_ITER 4"
    opts = [*SMALL, *schedule.split(), "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / "run")]
    start(["--config-file", "baseline_r50_fpn.yaml", "--wandb", "mine", *opts])
    assert {"total_loss", "lr", "repr/drop_filters", "repr/restore_overlap"} <= set().union(*(x for *_, x in arrived))


def test_wandb_that_is_missing_is_named(cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for use in (lambda: WandbWriter(cfg), lambda: start(["--config-file", "missing.yaml", "--wandb", "mine"])):
        assert "needs wandb: pip install 'repr_det[wandb]'" in refused(use)


def test_without_a_login_one_line_says_so(cfg, monkeypatch, wandb):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", cfg.OUTPUT_DIR)
    with pytest.raises(UserError, match=r"Weights & Biases: .*API key.* WANDB_MODE=offline keeps everything on disk"):
        WandbWriter(cfg, project="mine")
