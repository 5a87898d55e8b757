"""Two gloo processes on the CPU: same masks as one process, same weights on both ranks, no hang when one dies."""

import json
import multiprocessing
import time

import pytest
import torch
from rank_process import launch_and_tell

from repr_det.commands.arguments import train_argument_parser

TRANSITIONS = (
    "SOLVER.MAX_ITER 6 REPR.ENABLED True REPR.S1_ITERS 1 REPR.S2_ITERS 2 REPR.NUM_CYCLES 1 SOLVER.CHECKPOINT_PERIOD 1 "
    "DATASETS.TEST ()"
).split()


def run(folder, data, num_processes, opts, how=""):
    """None if all processes end well; else the line that a tool would end with, empty if there is none."""
    folder.mkdir(exist_ok=True)
    told = folder / "told"
    told.unlink(missing_ok=True)
    args = train_argument_parser().parse_args(["--num-gpus", str(num_processes)])
    args.main = (str(folder), str(data / "tiny.json"), str(data / "images"), opts, how)
    process = multiprocessing.get_context("spawn").Process(target=launch_and_tell, args=(args, str(told)))
    process.start()
    process.join(150)
    assert not process.is_alive(), "hangs"
    if told.exists():
        return told.read_text()
    return None if process.exitcode == 0 else ""


def events(folder):
    return [json.loads(line) for line in (folder / "run" / "repr_events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("norm", "criterion", "how"), [("BN", "ortho", ""), ("FrozenBN", "taylor", "channels_last")])
def test_both_ranks_agree_and_drop_what_one_process_drops(tiny_data, tmp_path, norm, criterion, how):
    opts = [*TRANSITIONS, "MODEL.RESNETS.NORM", norm, "REPR.CRITERION", criterion, "SOLVER.BASE_LR", "0.0001"]
    if how == "channels_last":  # 1x1 kernels have strides of their own there
        opts += ["REPR.LAYERS.INCLUDE", "['backbone.bottom_up.res?.*']"]
    if criterion == "ortho":
        opts += ["SOLVER.WARMUP_FACTOR", "0.0"]  # the first step changes nothing: one process has the same weights
    assert run(tmp_path / "two", tiny_data, 2, opts, how) is None
    ranks = [torch.load(tmp_path / "two" / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    for name in ranks[0]:
        if norm == "FrozenBN" or "running" not in name:  # BN keeps statistics of its own on every rank
            assert torch.equal(ranks[0][name], ranks[1][name]), name
    if criterion == "ortho":
        assert run(tmp_path / "one", tiny_data, 1, opts) is None
        assert events(tmp_path / "one")[0]["dropped"] == events(tmp_path / "two")[0]["dropped"]
    assert [e["event"] for e in events(tmp_path / "two")] == ["drop", "restore"]
    # gloo aborts some of the processes that exit as members of a group.
    assert [(tmp_path / "two" / f"exit{rank}.txt").read_text() for rank in (0, 1)] == ["alone", "alone"]


def test_two_processes_resume_bit_for_bit(tiny_data, tmp_path):
    assert run(tmp_path / "straight", tiny_data, 2, TRANSITIONS) is None
    assert run(tmp_path / "stopped", tiny_data, 2, TRANSITIONS, "die") is not None
    assert run(tmp_path / "stopped", tiny_data, 2, TRANSITIONS) is None
    for rank in (0, 1):
        a, b = (torch.load(tmp_path / x / f"rank{rank}.pth", weights_only=True) for x in ("straight", "stopped"))
        for name in a:
            # Plain BN's running statistics are not synchronised, and a checkpoint holds those of rank 0 alone.
            if rank == 0 or "running" not in name:
                assert torch.equal(a[name], b[name]), name


def test_a_rank_that_dies_ends_the_other(tiny_data, tmp_path):
    start = time.monotonic()
    told = run(tmp_path, tiny_data, 2, TRANSITIONS, "die")
    assert time.monotonic() - start < 90  # start-up included
    # Usually the parent sees the death first; gloo may tell the other rank before, which ends in its own error.
    assert told == "" or told.startswith("process 1 terminated with signal SIGKILL")


def test_ranks_that_disagree_are_told_apart(tiny_data, tmp_path):
    opts = [*TRANSITIONS, "REPR.START_ITER", "2"]
    assert run(tmp_path, tiny_data, 2, opts, "change") is None
    for rank in (0, 1):
        message = (tmp_path / f"error{rank}.txt").read_text()
        assert "layer backbone.bottom_up.res4.0.conv2 differs between rank 0 and rank(s) [1]" in message
