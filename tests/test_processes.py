"""Two gloo processes on the CPU: same masks as one process, same weights on both ranks, no hang when one dies."""

import time

import forked
import pytest
import torch
from outcomes import json_lines, train_words

TRANSITIONS = "SOLVER.MAX_ITER 6 REPR.ENABLED True REPR.S1_ITERS 1 REPR.S2_ITERS 2 REPR.NUM_CYCLES 1".split()
TRANSITIONS += "SOLVER.CHECKPOINT_PERIOD 1 DATASETS.TEST ()".split()


def run(folder, data, *opts, processes=2, flags=(), before="misbehaviour:end_in", arguments=None):
    folder.mkdir(exist_ok=True)
    words = train_words(data, folder / "run", *TRANSITIONS, *opts, flags=["--num-gpus", processes, *flags])
    return forked.run(words, folder / "log", before=before, arguments=[folder] if arguments is None else arguments)


def assert_error(status, text, beginning):
    assert status == 2, text
    assert text.rstrip().rpartition("\n")[2].startswith(f"repr-det train: error: {beginning}")


def test_both_ranks_drop_what_one_process_drops(tiny_data, tmp_path):
    # The first step changes nothing: one process has the same weights.
    opts = "SOLVER.BASE_LR 0.0001 SOLVER.WARMUP_FACTOR 0.0".split()
    status, text = run(tmp_path / "two", tiny_data, *opts)
    assert status == 0, text  # gloo aborts some of the processes that exit as members of a group
    assert run(tmp_path / "one", tiny_data, *opts, processes=1)[0] == 0
    two, one = (json_lines(tmp_path / name / "run" / "repr_events.jsonl") for name in ("two", "one"))
    assert [event["event"] for event in two] == ["drop", "restore"] and two[0]["dropped"] == one[0]["dropped"]
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    for name in first:
        assert "running" in name or torch.equal(first[name], second[name]), name  # BN's statistics: a rank's own


def test_a_rank_that_dies_ends_the_other_and_the_run_goes_on(tiny_data, tmp_path):
    start = time.monotonic()
    die = ("kill", "1", 1, 0, tmp_path / "once")
    status, text = run(tmp_path, tiny_data, before="misbehaviour:signal_at", arguments=die)
    assert status in (1, 2) and time.monotonic() - start < 90
    # Usually the parent sees the death first; gloo may tell the other rank before, which ends in its own error.
    if status == 2:
        assert_error(status, text, "process 1 terminated with signal SIGKILL, so the run stops;")
    assert run(tmp_path, tiny_data, flags=["--resume"])[0] == 0


def test_an_error_in_one_of_two_processes_is_one_line(tiny_data, tmp_path):
    status, text = run(tmp_path, tiny_data, "SOLVER.BASE_LR", "1e20")
    assert_error(status, text, "iteration ")
    assert "not finite" in text and "Traceback" not in text


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_an_evaluation_fills_is_one_line(tiny_data, tmp_path, processes):
    opts, fault = ("SOLVER.MAX_ITER", 4, "DATASETS.TEST", "('tiny_val',)"), "misbehaviour:fill_the_disk"
    status, text = run(tmp_path, tiny_data, *opts, processes=processes, before=fault, arguments=())
    assert_error(status, text, "[Errno 27] File too large: free space; a run goes on with --resume")
    assert "Traceback" not in text
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"


def test_processes_that_do_not_meet(tiny_data, tmp_path):
    flags = ["--num-machines", 2, "--dist-url", "tcp://nowhere.invalid:1", "--rendezvous-timeout", 2]
    status, text = run(tmp_path, tiny_data, processes=1, flags=flags)
    assert_error(status, text, "the processes of this run did not meet at tcp://nowhere.invalid:1 (")
