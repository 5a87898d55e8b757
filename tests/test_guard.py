"""Runs that go wrong - numbers, a full disk, a bad image - stop with one line, and leave the last checkpoint alone."""

import resource

import forked
import pytest
import torch
from conftest import At, assert_same_weights, end_of, interrupt, refused
from detectron2.engine import HookBase, hooks
from outcomes import train_words
from torch import nn

from repr_det import Trainer, UserError
from repr_det.runs.guard import FiniteGuard, NonFiniteError, non_finite_weight

# Iterations 3 to 5 are in the sub-network phase.
FAULTS = "SOLVER.MAX_ITER 8 REPR.ENABLED True REPR.S1_ITERS 3 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1".split()
FAULTS += "SOLVER.CHECKPOINT_PERIOD 2 DATASETS.TEST ()".split()
LAYER = "backbone.bottom_up.res4.0.conv2"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("loss", f"the loss is not finite, nor is the weight of {LAYER}.weight"),
        ("gradient", f"the gradient of {LAYER}.weight is not finite"),
        ("weight", f"the weight of {LAYER}.weight is not finite"),
    ],
)
def test_stops_with_iteration_phase_and_layer(tiny_cfg, tmp_path, where, expected):
    trainer = Trainer(tiny_cfg(*FAULTS, "SOLVER.CHECKPOINT_PERIOD", "1"))

    def poison():
        weight = trainer.model.get_submodule(LAYER).weight
        row = weight.flatten(1).any(1).nonzero()[0]  # a filter that is not dropped
        if where == "loss":
            weight.data[row] = float("nan")
        elif where == "gradient":
            weight.register_hook(lambda grad: grad.index_fill(0, row, float("inf")))
        else:  # after the backward pass, as an optimizer that overflows would
            trainer.optimizer.register_step_post_hook(lambda *_: weight.data.index_fill_(0, row, float("inf")))

    trainer.register_hooks([At(3, poison)])
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert str(error.value).startswith(f"iteration 3, sub-network phase: {expected}") and "\n" not in str(error.value)
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000002.pth"
    saved = torch.load(tmp_path / "run" / "model_0000002.pth", weights_only=True)["model"]
    assert all(torch.isfinite(t).all() for t in saved.values())


def test_gradients_are_looked_at_on_the_cpu_or_when_asked_for_and_a_norm_may_overflow(tiny_cfg, monkeypatch):
    """On a GPU a look makes the host wait, in every step."""
    trainer = Trainer(tiny_cfg(*FAULTS))
    guard = next(hook for hook in trainer._hooks if isinstance(hook, FiniteGuard))
    assert guard.check_gradients
    looks = []
    monkeypatch.setattr("repr_det.runs.guard.non_finite_weight", lambda model: looks.append(trainer.iter))
    guard.check_gradients = False
    trainer.train()
    assert looks == [1, 2, 3, 5, 7]  # before checkpoints, the drop and the restore
    assert non_finite_weight(nn.ParameterList([torch.full((4,), 3e38)])) == ""


@pytest.mark.parametrize("moment", ["before_train", "before_step", "after_step"])
def test_a_run_that_fails_in_its_last_iteration_is_not_evaluated(tiny_cfg, monkeypatch, moment):
    trainer, fault = Trainer(tiny_cfg("SOLVER.MAX_ITER", 1)), HookBase()
    setattr(fault, moment, interrupt)
    for owner, name in ((trainer, "test"), (hooks.BestCheckpointer, "_best_checking")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("evaluated"))
    trainer._hooks.insert(0, fault)
    trainer.register_hooks([hooks.BestCheckpointer(1, trainer.checkpointer, "bbox/AP")])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_full_disk(tiny_cfg, tmp_path):
    """A limit on the size of files refuses writes as a full disk does, in the middle of a checkpoint."""
    straight = end_of(tiny_cfg(*FAULTS, "OUTPUT_DIR", tmp_path / "straight"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = tiny_cfg(*FAULTS)
    try:
        message = refused(end_of, cfg, At(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the checkpoint model_0000005 could not be written" in message and "File too large" in message
    folder = tmp_path / "run"
    assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"
    written = {p.name for p in folder.iterdir() if "model" in p.name or "saving" in p.name}
    assert written == {"model_0000001.pth", "model_0000003.pth"}
    assert_same_weights(end_of(cfg, resume=True), straight)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_goes_bad(tiny_cfg, tiny_data, tmp_path, workers):
    opts = [*FAULTS, "DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", 24]
    straight = end_of(tiny_cfg(*opts, "SOLVER.CHECKPOINT_PERIOD", 100, "OUTPUT_DIR", tmp_path / "straight"))
    path = tiny_data / "images" / "4.png"
    whole = path.read_bytes()
    cfg = tiny_cfg(*opts, "SOLVER.CHECKPOINT_PERIOD", 1)
    try:
        with pytest.raises(UserError) as error:
            end_of(cfg, At(5, lambda: path.write_bytes(whole[: len(whole) // 2])))
    finally:
        path.write_bytes(whole)
    last_line = str(error.value).rstrip().rpartition("\n")[2]  # workers put a traceback before it
    assert f"{path} cannot be read and prepared for the model: " in last_line and "repair the file" in last_line
    assert_same_weights(end_of(cfg, resume=True), straight)


def test_too_many_open_files(tiny_data, tmp_path):
    words = train_words(tiny_data, tmp_path / "run", *FAULTS, "DATALOADER.NUM_WORKERS", 4)
    limit = (resource.RLIMIT_NOFILE, (40, 40))
    status, text = forked.run(words, tmp_path / "log", before="resource:setrlimit", arguments=limit)
    assert status == 2, text  # workers print tracebacks of their own
    line = text.rstrip().rpartition("\n")[2]
    assert line.startswith("repr-det train: error: ") and ("Too many open files" in line or "a loader worker" in line)
    assert line.endswith("(ulimit -n) or lower DATALOADER.NUM_WORKERS; a run goes on with --resume")
