"""Which checkpoint a resumed run continues from; other files of weights; a run leaves another one's files alone."""

import errno
import os
from contextlib import nullcontext

import pytest
import torch
from conftest import At, assert_same_weights, contents, end_of, interrupt, refused
from detectron2.engine import HookBase, hooks
from detectron2.utils.env import seed_all_rng
from outcomes import json_lines
from torch import nn

from repr_det import RePrHook, Trainer, UserError
from repr_det.runs.checkpoints import AtomicCheckpointer, find_checkpoint, zero_filters
from repr_det.runs.files import truncate_log
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
    before = contents(tmp_path)
    state.num_batches_tracked.fill_(0)
    nn.init.constant_(model.weight, 0)
    checkpointer.resume_or_load("", resume=True)
    assert state.num_batches_tracked == 100 and model.weight[0, 0] == 100
    assert "no last_checkpoint: resuming from the newest checkpoint, " in caplog.text
    assert contents(tmp_path) == before
    damaged = tmp_path / "model_0000100.pth"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    for content, told in (
        ("model_0000100.pth", r"model_0000100.pth: not a readable .* write its name into .*last_checkpoint"),
        ("\xff\x00", "which is not there: write the name of a checkpoint into it"),
    ):
        (tmp_path / "last_checkpoint").write_text(content)
        with pytest.raises(UserError, match=told):
            checkpointer.resume_or_load("", resume=True)


def test_lines_of_transitions_that_come_again_are_removed(tmp_path):
    path = tmp_path / "repr_events.jsonl"
    truncate_log(path, 0)
    lines = [f'{{"iteration": {i}}}\n' for i in (0, 1, 3, 5)]
    with open(path, "a") as held:  # as Detectron2's writer does
        held.write("".join(lines) + '{"iteration": 2')  # cut short
        held.flush()
        truncate_log(path, 3)
        held.write(lines[2])
    assert path.read_text() == "".join(lines[:3])


def test_a_used_folder_is_resumed_with_the_same_model_or_refused(tiny_cfg, tmp_path):
    first = Trainer(tiny_cfg())
    first.checkpointer.save("model_0000001", iteration=1)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"this run has \d+ parameters in \d+ groups .*: resume with the same MODEL"):
        Trainer(tiny_cfg("MODEL.BACKBONE.FREEZE_AT", 2)).resume_or_load(resume=True)
    other = Trainer(tiny_cfg())
    other.resume_or_load(resume=False)
    assert "holds another run (last_checkpoint, model_0000001.pth): resume_or_load(resume" in refused(other.train)
    assert before.items() <= contents(tmp_path / "run").items()


@pytest.mark.parametrize(
    ("name", "advice", "file"),
    [("EBUSY", "see to the file system", "model_0000001.pth"), ("ENOSPC", "free space", "last_checkpoint")],
)
def test_a_rename_that_fails(tmp_path, monkeypatch, name, advice, file):
    checkpointer = AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000000", iteration=0)
    before, replace = contents(tmp_path), os.replace

    def refuse(source, target):
        if os.path.basename(target) == file:
            raise OSError(getattr(errno, name), "no", target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=f"model_0000001 could not be written .* untouched: {advice}, then --resume"):
        checkpointer.save("model_0000001", iteration=1)
    monkeypatch.undo()
    left = contents(tmp_path)
    assert before.items() <= left.items() and not [name for name in left if name.startswith(".")]
    checkpointer.save("model_0000001", iteration=1)
    assert find_checkpoint(tmp_path).name == "model_0000001.pth"


def test_another_optimizer_is_refused():
    parameters = nn.Linear(1, 1).parameters
    old, new = torch.optim.SGD(parameters()), torch.optim.AdamW(parameters())
    told = "2 parameters in 1 groups with .*momentum.*; this run has 2 parameters in 1 groups with .*betas"
    with pytest.raises(UserError, match=f"is of another optimizer, {told}"):
        check_same_optimizer(new, old.state_dict(), "folder")
    check_same_optimizer(new, new.state_dict(), "folder")


RUN = "SOLVER.MAX_ITER 4 DATASETS.TEST () REPR.ENABLED True REPR.S1_ITERS 1 REPR.S2_ITERS 1 REPR.NUM_CYCLES 1".split()


@pytest.mark.parametrize("enabled", [True, False])
def test_one_trainer_trains_once(tiny_cfg, enabled):
    trainer = Trainer(tiny_cfg(*RUN, "REPR.ENABLED", enabled))
    trainer.register_hooks([At(1, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "this trainer has trained before: make another one and call resume_or_load" in refused(trainer.train)


def test_a_resumed_run_keeps_its_best_checkpoint(tiny_cfg, tmp_path, monkeypatch):
    cfg = tiny_cfg(*RUN, "SOLVER.MAX_ITER", 8, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 4)
    ap = iter([50.0, 40.0, 40.0, 45.0, 45.0])  # the resumed run evaluates again after its checkpoint
    monkeypatch.setattr(Trainer, "test", lambda self, cfg, model: {"bbox": {"AP": next(ap)}})
    for stopped in (True, False):
        trainer = Trainer(cfg)
        best = hooks.BestCheckpointer(2, trainer.checkpointer, "bbox/AP")
        trainer.register_hooks([best, *([At(5, interrupt)] if stopped else [])])
        trainer.resume_or_load(resume=True)
        with pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
            trainer.train()
    assert (best.best_metric, best.best_iter, next(ap, None)) == (50.0, 1, None)
    assert torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)["iteration"] == 1


class OwnHook(RePrHook):
    pass


def test_a_run_whose_last_checkpoint_is_its_best_goes_on(tiny_cfg, tmp_path, monkeypatch):
    """It is written after the last iteration; here RePr is a hook of the user's own."""
    monkeypatch.setattr(Trainer, "test", lambda self, cfg, model: {"bbox": {"AP": self.iter}})
    monkeypatch.setattr(Trainer, "build_repr_hook", lambda *_: OwnHook(s1_iters=1, s2_iters=1, num_cycles=1))

    def trained(folder, max_iter, seed=5):
        seed_all_rng(seed)
        trainer = Trainer(tiny_cfg("SOLVER.MAX_ITER", max_iter, "TEST.EVAL_PERIOD", 2, "OUTPUT_DIR", tmp_path / folder))
        trainer.register_hooks([hooks.BestCheckpointer(2, trainer.checkpointer, "bbox/AP")])
        trainer.resume_or_load()
        trainer.train()
        assert (tmp_path / folder / "last_checkpoint").read_text() == "model_best.pth"
        return trainer.model.state_dict()

    short = trained("run", 4)
    assert_same_weights(trained("run", 4, 6), short)
    assert_same_weights(trained("run", 6, 7), trained("straight", 6))
    monkeypatch.undo()
    assert "was trained with RePr on, this run has it off" in refused(Trainer(tiny_cfg()).resume_or_load)


def test_a_run_in_a_used_folder_ends_with_files_of_its_own(tiny_cfg, tmp_path):
    final, events = (tmp_path / "run" / name for name in ("model_final.pth", "repr_events.jsonl"))

    def train(max_iter):
        end_of(tiny_cfg(*RUN[2:4], "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", max_iter), resume=True)
        return torch.load(final, weights_only=True)["iteration"], events.read_text()

    final.parent.mkdir()
    events.write_text('{"iteration": 1}\n')  # a run with RePr was killed before its first checkpoint
    assert train(4) == (3, "")
    old = final.read_bytes()
    train(6)
    final.write_bytes(old)  # as if killed between its last two checkpoints
    (final.parent / "last_checkpoint").unlink()
    assert find_checkpoint(final.parent).name == "model_0000005.pth"
    assert train(6) == (5, "")


def test_evaluations_of_ones_own_are_repeated(tiny_cfg, tmp_path):
    """They draw random numbers, and the run stops in the last one after its checkpoint."""

    def end(folder, resume=False, last=torch.rand):
        cfg = tiny_cfg(*RUN, "SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 4, "OUTPUT_DIR", tmp_path / folder)
        own = [(2, torch.rand), (3, torch.rand), (4, last)]
        return end_of(cfg, *(hooks.EvalHook(n, lambda f=f: {"own": f(1)}) for n, f in own), resume=resume)

    with pytest.raises(KeyboardInterrupt):
        end("stopped", last=lambda _: interrupt())
    assert_same_weights(end("stopped", resume=True), end("straight"))


@pytest.mark.parametrize("period", [20, 4])
def test_an_evaluation_that_was_stopped_is_logged_by_the_resumed_run(tiny_cfg, tmp_path, monkeypatch, period):
    """Stopped after the checkpoint of iteration 3, and again before the resumed run has evaluated."""
    cfg = tiny_cfg("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 4)
    monkeypatch.setattr(Trainer, "test", lambda *_: interrupt() if stops == "evaluation" else {"bbox": {"AP": 1.0}})
    for stops in ("evaluation", "before_train", ""):
        trainer, fault = Trainer(cfg), HookBase()
        vars(fault).update({stops: interrupt})
        trainer.register_hooks([fault])
        for hook in trainer._hooks:
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = period
        trainer.resume_or_load(resume=True)
        with pytest.raises(KeyboardInterrupt) if stops else nullcontext():
            trainer.train()
    rows = json_lines(tmp_path / "run" / "metrics.json")
    assert sorted(row["iteration"] for row in rows) == [3, 5, 6]
    assert {row["iteration"] for row in rows if "bbox/AP" in row} == {3, 6}


def test_training_in_pieces_is_told_its_cause(tiny_cfg):
    trainer = Trainer(tiny_cfg(*RUN))
    trainer.max_iter = 2
    assert "max_iter is 2, but SOLVER.MAX_ITER is 4: to train in pieces, stop a run and" in refused(trainer.train)


@pytest.mark.parametrize(
    ("rows", "norm", "expected"),
    [
        ((), (), {}),
        ((1, 4), (1, 4), {"conv": [1, 4]}),
        ((1, 4), (4,), {"conv": [4]}),
        ((), range(6), {}),  # zero_init_residual
        (range(6), range(6), {}),  # begins so, as deformable offsets do
    ],
)
def test_which_filters_are_switched_off(rows, norm, expected):
    net = nn.Sequential()
    net.conv = nn.Conv2d(3, 6, 3, bias=False)
    net.conv.norm = nn.BatchNorm2d(6)
    nn.init.normal_(net.conv.norm.bias)
    for tensor, zeros in ((net.conv.weight, rows), (net.conv.norm.weight, norm), (net.conv.norm.bias, norm)):
        tensor.data[list(zeros)] = 0
    weights = net.state_dict()
    weights |= {f"transposed.{key}": value for key, value in nn.ConvTranspose2d(8, 4, 2).state_dict().items()}
    assert zero_filters(weights) == zero_filters({k: v.numpy() for k, v in weights.items()}) == expected
