"""WandbWriter in wandb's offline mode: what arrives in the run, and that a resumed run goes on in it."""

import importlib.util
import json
import re
import sys
import types

import pytest
from conftest import SMALL
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage

from repr_det import UserError, add_repr_config
from repr_det.commands.train import start
from repr_det.detectron.trackers import WandbWriter
from repr_det.runs.files import truncate_log

EVENTS = [
    dict(iteration=3, event="drop", cycle=0, dropped={"a": [1], "b": []}, overlap_before=0.5, overlap_after=0.25),
    dict(iteration=5, event="restore", cycle=0, dropped={"a": [1], "b": []}, overlap_before=0.3, overlap_after=0.125),
]


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_repr_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    return cfg


def append(folder, event):
    with open(folder / "repr_events.jsonl", "a") as file:
        file.write(json.dumps(event) + "\n")
    with open(folder / "repr_overlaps.jsonl", "a") as file:
        file.write(json.dumps({"iteration": event["iteration"], "overlap": {"a": [0.1, 0.9], "b": [0.2, 0.3]}}) + "\n")


def test_config_scalars_transitions_and_plot(cfg, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    writer = WandbWriter(cfg, mode="offline", project="test")
    run = writer._run
    assert run.config["REPR"]["DROP_RATIO"] == 0.3 and run.config["SOLVER"]["STEPS"] == [30000]
    log = run.log
    monkeypatch.setattr(run, "log", lambda values, step: (logged.append((step, values)), log(values, step=step)))
    with EventStorage(0) as storage:
        for iteration in range(8):
            storage.iter = iteration
            storage.put_scalar("total_loss", 10.0 - iteration, smoothing_hint=False)
            for event in EVENTS:
                if event["iteration"] == iteration:
                    append(tmp_path / "run", event)
            if iteration % 2:
                writer.write()
    writer.close()
    assert [step for step, _ in logged] == [1, 3, 3, 5, 5, 7]
    assert [values["total_loss"] for _, values in logged if "total_loss" in values] == [9.0, 7.0, 5.0, 3.0]
    assert [name for _, values in logged for name in values if name.endswith("overlap")] == [
        "repr/drop_overlap",
        "repr/restore_overlap",
    ]
    assert logged[1][1]["repr/drop_filters"] == 1 and logged[3][1]["repr/restore_overlap_after"] == 0.125
    pictures = list((tmp_path / "run").rglob("media/images/repr/*.png"))
    assert sorted(x.name.split("_")[0] for x in pictures) == ["drop", "restore"]
    assert list((tmp_path / "run").rglob("*.wandb"))

    again = WandbWriter(cfg, mode="offline", project="test")
    assert again._run.id == run.id
    again.close()


@pytest.mark.parametrize("written", [False, True])
def test_a_drop_before_the_kill_arrives_once(cfg, tmp_path, monkeypatch, written):
    """The run is killed after a drop, before or after the writer has sent it, and resumed from a checkpoint before it:
    the log is cut back, and the drop made again."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    arrived = []
    run = types.SimpleNamespace(log=lambda values, step: arrived.extend((step, x) for x in values), finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    folder = tmp_path / "run"
    for begin, end in ((0, 6), (2, 8)):
        writer = WandbWriter(cfg)
        for name in ("repr_events.jsonl", "repr_overlaps.jsonl"):
            truncate_log(folder / name, begin)
        with EventStorage(begin) as storage:
            for iteration in range(begin, end):
                storage.iter = iteration
                for event in EVENTS:
                    if event["iteration"] == iteration:
                        append(folder, event)
                if (begin > 0 or written) and iteration % 2:
                    writer.write()
    assert [x for x in arrived if x[1].endswith("_filters")] == [(3, "repr/drop_filters"), (5, "repr/restore_filters")]


def test_wandb_that_is_missing_is_named(cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"WandbWriter needs wandb: pip install 'repr_det\[wandb\]'"):
        WandbWriter(cfg)


def test_train_with_wandb_and_resumed_is_one_run_with_every_transition(tiny_data, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads them once in a process
    logged, ids = {}, set()
    log = wandb.Run.log

    def spy(run, values, step):
        ids.add((run.id, run.project))
        logged.update({name: step for name in values})
        log(run, values, step=step)

    monkeypatch.setattr(wandb.Run, "log", spy)
    schedule = "REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 1 REPR.NUM_CYCLES 1 SOLVER.CHECKPOINT_PERIOD 2"
    opts = [*SMALL, *schedule.split(), "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / "run")]
    arguments = ["--config-file", "baseline_r50_fpn.yaml", "--wandb", "mine"]
    start([*arguments, *opts, "SOLVER.MAX_ITER", "4"])
    (tmp_path / "run" / "model_final.pth").unlink()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    start([*arguments, "--resume", *opts, "SOLVER.MAX_ITER", "4"])
    assert len(ids) == 1 and next(iter(ids))[1] == "mine"
    assert {"total_loss", "lr", "repr/drop_filters", "repr/restore_overlap"} <= set(logged)


def test_wandb_flag_without_wandb_is_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("--wandb mine needs wandb, which is not installed: pip install")):
        start(["--config-file", "missing.yaml", "--wandb", "mine"])


def test_without_a_login_one_line_says_so(cfg, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", cfg.OUTPUT_DIR)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    with pytest.raises(UserError, match=r"Weights & Biases: .*API key.* WANDB_MODE=offline keeps everything on disk"):
        WandbWriter(cfg, project="mine")
