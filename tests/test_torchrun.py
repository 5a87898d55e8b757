"""Runs that torchrun starts: equal to those of --num-gpus, through killed ranks and agents, SIGTERM and restarts."""

import os
import random
import signal
import socket
import sys
import uuid
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT
from outcomes import assert_same, json_lines, outcome, train_words

OPTS = "SOLVER.MAX_ITER 12 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 2 REPR.NUM_CYCLES 2 DATASETS.TEST ()".split()
OPTS += "SOLVER.CHECKPOINT_PERIOD 3 DATALOADER.NUM_WORKERS 1".split()  # signals to a process group reach workers too
EARLY_WARNING = "--register tiny_val is not used"  # said before the run has a log
ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))  # `make soak` sets more


def one_machine(processes=2):
    """The options that torchrun --standalone stands for, and restarts."""
    words = ["--nproc_per_node", processes, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*words, "--rdzv-id", uuid.uuid4(), "--max-restarts", 3]


@pytest.fixture(scope="module")
def train(tiny_data):
    """``train(folder, torchrun's words, resume=False, misbehave=(), opts=(), tell="")`` -> the started command; without
    torchrun's words two processes by --num-gpus."""
    begun = []

    def start(folder, torchrun=(), *, resume=False, misbehave=(), opts=(), tell="", **environment):
        flags = [*(["--resume"] if resume else []), *([] if torchrun else ["--num-gpus", 2])]
        words = train_words(tiny_data, folder, *OPTS, *opts, flags=flags)
        before = "misbehaviour:tell" if tell else "misbehaviour:signal_at" if misbehave else ""
        arguments = ([tell] if tell else []) + ([*misbehave, f"{folder}.once"] if misbehave else [])
        options = {"environment": environment, "before": before, "arguments": arguments, "torchrun": torchrun}
        begun.append(forked.Command(words, f"{folder}.log", **options))
        return begun[-1]

    yield start
    for command in begun:
        command.kill()


def ended(command):
    """The outcome of a command, which must end well."""
    assert command.status() == 0, command.text[-4000:]
    folder = command.log.with_suffix("")
    log = (folder / "log.txt").read_text()
    assert "World size: 2" in log and EARLY_WARNING in log
    assert "12 training images, 12 iterations of 2 images: 2 epochs; RePr is on (ortho; REPR.ENABLED False" in log
    return outcome(folder)


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """The undisturbed run, of two processes by --num-gpus."""
    job = train(tmp_path_factory.mktemp("straight") / "run")
    assert job.status() == 0 and job.text.count(EARLY_WARNING) == 1
    return ended(job)


@pytest.mark.slow
def test_the_real_torchrun(tiny_data, straight, tmp_path):
    """Agent and workers are new interpreters, as for a user."""
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT / 'tests')!r}]\nimport tiny_backbone\n"
        "from repr_det.commands.console import main\nmain()\n"
    )
    words = train_words(tiny_data, tmp_path / "run", *OPTS)[1:]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *words]
    status, text = forked.run(["os:execlp", command[0], *command], tmp_path / "log")
    assert status == 0, text[-4000:]
    assert_same(outcome(tmp_path / "run"), straight)


@pytest.mark.parametrize(
    ("by", "how"),
    [*(("torchrun", how) for how in ("kill", "TERM", "kill-agent")), ("num-gpus", "TERM"), ("num-gpus", "INT")],
)
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_killed_rank_is_started_again_and_a_stopped_job_goes_on(train, straight, tmp_path, round_, by, how):
    """SIGTERM to the agent, as Slurm sends it before it takes the machine, and an agent that is killed."""
    rng = random.Random(100 + round_)
    folder, rank, iteration = tmp_path / "run", rng.choice("01"), rng.randint(3, 8)
    words = one_machine() if by == "torchrun" else ()
    job = train(folder, words, resume=how != "kill", misbehave=(how, rank, iteration, rng.uniform(0, 0.1)))
    if how != "kill":
        # torchrun ends with a traceback and 1, or aborted if its store is still at work.
        assert job.status() == 75 if not words else job.status() != 0, job.text[-4000:]
        if how in ("TERM", "INT"):
            assert int((folder / "last_checkpoint").read_text()[6:13]) in range(iteration, 11), job.text[-4000:]
            assert job.text.count(f"stopped by SIG{how} with status 75") == 1
        job = train(folder, words, resume=True)
    assert_same(ended(job), straight)
    assert (tmp_path / "run.once").exists()


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_two_agents_of_which_one_is_killed_and_comes_back(train, straight, tmp_path, round_):
    """Two agents on the loopback address stand in for two machines; the one that keeps the rendezvous stays."""
    rng = random.Random(200 + round_)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--nnodes", 2, "--nproc_per_node", 1, "--max-restarts", 3, "--rdzv-backend", "c10d", "--rdzv-id", "job"]
    words += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "join_timeout=90"]
    # torch 2.14's agents share the store of their first round, which an agent that comes later does not find.
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first = train(tmp_path / "run", words, **apart)

    def listens():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    forked.wait_until(listens)  # the first to come keeps the rendezvous
    misbehave = ("kill-agent", "any", rng.randint(4, 10), rng.uniform(0, 0.1))
    second = train(tmp_path / "run", words, misbehave=misbehave, **apart)
    assert second.status() == -signal.SIGKILL
    again = train(tmp_path / "run", words, **apart)
    assert_same(ended(first), straight)
    assert again.status() == 0


def test_another_number_of_ranks(train, tmp_path):
    """Two ranks, stopped in the sub-network phase of the second cycle, resume as one, and that one, stopped, as two."""
    folder, opts = tmp_path / "run", ["SOLVER.MAX_ITER", 17, "DATALOADER.NUM_WORKERS", 0]
    assert train(folder, one_machine(), misbehave=("TERM", "0", 6, 0), opts=opts).status() != 0
    for number, before in ((1, 2), (2, 1)):
        Path(f"{folder}.once").unlink()
        told = tmp_path / f"told{number}.pth"
        saved = torch.load(folder / (folder / "last_checkpoint").read_text(), weights_only=True)
        misbehave = ("TERM", "0", 13, 0) if number == 1 else ()
        job = train(folder, one_machine(number), resume=True, misbehave=misbehave, opts=opts, tell=str(told))
        assert (job.status() == 0) == (number == 2), job.text[-4000:]
        assert job.text.count(EARLY_WARNING) == 1 + number  # one for each job so far
        begun = torch.load(told, weights_only=True)
        hooks, hooks_saved = begun["trainer"]["hooks"], saved["trainer"]["hooks"]
        assert any(mask.any() for mask in hooks["RePrHook"]["scheme"]["masks"].values()) == (number == 1)
        for name in ("RePrHook", "LRScheduler"):
            assert_same(hooks[name], hooks_saved[name])
        assert_same(begun["trainer"]["_trainer"], saved["trainer"]["_trainer"])
        assert_same(begun["model"], saved["model"])
        warning = f"number of processes was {before} and is {number}; number of images per process and batch was "
        assert job.text.count(f"{warning}{number} and is {before}: the data order of this run is another one") == 1
    events = [(event["iteration"], event["event"]) for event in json_lines(folder / "repr_events.jsonl")]
    assert events == [(1, "drop"), (3, "restore"), (5, "drop"), (7, "restore")]
