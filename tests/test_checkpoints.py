"""Which checkpoint a resumed run continues from; nothing of a run is destroyed by one that does not continue it."""

import errno
import logging
import os
from contextlib import nullcontext

import pytest
import torch
from conftest import At, interrupt
from detectron2.engine import DefaultTrainer
from torch import nn

from repr_det import Trainer, UserError
from repr_det.runs.checkpoints import AtomicCheckpointer, check_last_checkpoint, find_checkpoint
from repr_det.runs.files import keep_checkpoints, truncate_log
from repr_det.runs.resume import check_same_optimizer


def test_resumes_from_the_newest_checkpoint_and_says_so(tmp_path, caplog):
    """Its tag is lost; files that no run wrote are no checkpoints of it."""
    assert not AtomicCheckpointer(nn.Linear(1, 1), "").has_checkpoint()
    model, state = nn.Linear(2, 2), nn.BatchNorm1d(1)  # what a trainer is to its checkpointer
    checkpointer = AtomicCheckpointer(model, str(tmp_path), trainer=state)
    assert not checkpointer.has_checkpoint()
    for iteration in (9, 99, 100):
        state.num_batches_tracked.fill_(iteration)
        nn.init.constant_(model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    for name in ("weights.pth", "model_best.pth"):
        torch.save({"model": model.state_dict()}, tmp_path / name)
    (tmp_path / "last_checkpoint").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model, state = nn.Linear(2, 2), nn.BatchNorm1d(1)
    checkpointer = AtomicCheckpointer(model, str(tmp_path), trainer=state)
    with caplog.at_level(logging.WARNING, "repr_det.resume"):
        checkpointer.resume_or_load("", resume=True)
    assert state.num_batches_tracked == 100 and model.weight[0, 0] == 100
    assert "has no last_checkpoint: resuming from model_0000100.pth" in caplog.text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    damaged = tmp_path / "model_0000100.pth"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model_0000100.pth: not a readable .* write its name into .*last_checkpoint"):
        check_last_checkpoint(str(tmp_path))
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    check_last_checkpoint(str(tmp_path))
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match="which is not there: write the name of a checkpoint in that folder into it"):
        check_last_checkpoint(str(tmp_path))


def test_a_run_from_the_beginning_keeps_the_lines_of_another(tmp_path):
    path = tmp_path / "repr_events.jsonl"
    first, second = ("".join(f'{{"iteration": {i}, "run": "{run}"}}\n' for i in range(3)) for run in "ab")
    with open(path, "a") as held:  # as Detectron2's writer does
        held.write(first)
        held.flush()
        truncate_log(path, 0)
        held.write(second)
        held.flush()
        truncate_log(path, 2)
    assert (tmp_path / "repr_events.jsonl.1").read_text() == first
    assert path.read_text() == "".join(second.splitlines(keepends=True)[:2])
    truncate_log(path, 0)
    assert (tmp_path / "repr_events.jsonl.2").exists() and path.read_text() == ""
    truncate_log(path, 0)  # nothing to keep
    assert not (tmp_path / "repr_events.jsonl.3").exists()


def test_the_checkpoints_of_an_earlier_run_are_kept(tmp_path):
    names = {"model_0000001.pth": b"a", "model_final.pth": b"b", "last_checkpoint": b"model_final.pth"}
    for number in (1, 2):
        for name, content in names.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "pretrained.pth").write_bytes(b"c")  # no run writes that
        assert keep_checkpoints(tmp_path) == [f"{name}.{number}" for name in sorted(names)]
        for name, content in names.items():
            assert (tmp_path / f"{name}.{number}").read_bytes() == content
            assert not (tmp_path / name).exists()
    assert keep_checkpoints(tmp_path) == [] and (tmp_path / "pretrained.pth").exists()


def test_a_used_folder_is_resumed_with_the_same_model_or_kept_aside(tiny_cfg, tmp_path, monkeypatch, caplog):
    """Trainer without the command, as notebooks use it: cells are run again."""
    monkeypatch.setattr(DefaultTrainer, "before_train", lambda self: None)
    first = Trainer(tiny_cfg())
    first.iter = 1
    first.checkpointer.save("model_0000001", iteration=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*")}
    other = Trainer(tiny_cfg("MODEL.BACKBONE.FREEZE_AT", 2))
    with pytest.raises(UserError, match=r"this run has \d+ parameters in \d+ groups .*: resume with the same MODEL"):
        other.resume_or_load(resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*")} == before
    other = Trainer(tiny_cfg())
    other.resume_or_load(resume=False)
    with caplog.at_level(logging.WARNING, "repr_det.resume"):
        other.before_train()
    assert "holds the checkpoints of an earlier run: kept as last_checkpoint.1, model_0000001.pth.1" in caplog.text
    kept = {path.stem: path.read_bytes() for path in (tmp_path / "run").glob("*.1")}
    assert len(kept) == 2 and kept.items() <= before.items()


@pytest.mark.parametrize(
    ("name", "advice", "file"),
    [("EBUSY", "see to the file system", "model_0000001.pth"), ("ENOSPC", "free space", "last_checkpoint")],
)
def test_a_rename_that_fails(tmp_path, monkeypatch, name, advice, file):
    """As on a network file system; what is there stays, and the next save goes well."""
    checkpointer = AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000000", iteration=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = os.replace

    def refuse(source, target):
        if os.path.basename(target) == file:
            raise OSError(getattr(errno, name), "no", target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=f"model_0000001 could not be written .* untouched: {advice}, then --resume"):
        checkpointer.save("model_0000001", iteration=1)
    monkeypatch.undo()
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left | before == left and left["last_checkpoint"] == b"model_0000000.pth"
    assert not [name for name in left if name.startswith(".")]
    checkpointer.save("model_0000001", iteration=1)
    assert find_checkpoint(tmp_path).name == "model_0000001.pth"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (torch.optim.SGD, torch.optim.AdamW, "momentum.*; this run has 2 parameters in 1 groups with .*betas"),
        (torch.optim.AdamW, torch.optim.RMSprop, "betas.*; this run has .*alpha"),
    ],
)
def test_another_optimizer_is_refused(old, new, told):
    parameters = nn.Linear(1, 1).parameters
    with pytest.raises(UserError, match=f"is of another optimizer, 2 parameters in 1 groups with .*{told}"):
        check_same_optimizer(new(parameters()), old(parameters()).state_dict(), "folder")
    check_same_optimizer(new(parameters()), new(parameters()).state_dict(), "folder")


RUN = "SOLVER.MAX_ITER 4 DATASETS.TEST () REPR.ENABLED True REPR.S1_ITERS 1 REPR.S2_ITERS 1 REPR.NUM_CYCLES 1".split()


@pytest.mark.parametrize("interrupted", [False, True])
def test_one_trainer_trains_once(tiny_cfg, interrupted):
    """As when a cell of a notebook is run again."""
    trainer = Trainer(tiny_cfg(*RUN))
    trainer.register_hooks([At(1, interrupt)] if interrupted else [])
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        trainer.train()
    with pytest.raises(UserError, match="this trainer has trained before: make another one, on which resume_or_load"):
        trainer.train()


def test_training_in_pieces_is_told_its_cause(tiny_cfg):
    trainer = Trainer(tiny_cfg(*RUN))
    trainer.max_iter = 2
    with pytest.raises(UserError, match=r"max_iter is 2, but SOLVER.MAX_ITER is 4, .* resume it in another trainer"):
        trainer.train()
