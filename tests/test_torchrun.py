"""Runs that torchrun starts: equal to those of --num-gpus, through killed ranks and agents, SIGTERM and restarts."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from test_lazy import SMALL as SMALL_LAZY

HERE = Path(__file__).parent
OPTS = (
    "SOLVER.MAX_ITER 12 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 2 REPR.NUM_CYCLES 2 SOLVER.CHECKPOINT_PERIOD 3 "
    "DATASETS.TEST () DATALOADER.NUM_WORKERS 1"  # a signal to a group of processes reaches loader workers too
).split()
ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))  # `make soak` sets more


@pytest.fixture(scope="module")
def train(tiny_data):
    """``train(folder, *torchrun's words, resume=False, misbehave="", opts=())`` -> the started process; without
    torchrun's words two processes by --num-gpus. ``lazy``: a LazyConfig instead of the yaml config."""
    begun = []

    def start(folder, *torchrun, resume=False, misbehave="", opts=(), lazy=None, **environment):
        register = [
            x
            for name in ("tiny_train", "tiny_val")
            for x in ("--register", name, tiny_data / "tiny.json", tiny_data / "images")
        ]
        launcher = [sys.executable, *(("-m", "torch.distributed.run", *torchrun) if torchrun else ())]
        flags = ["--config-file", lazy or ROOT / "configs" / "baseline_r50_fpn.yaml", *register]
        flags += ["--resume"] * resume + ([] if torchrun else ["--num-gpus", 2, "--dist-url", "auto"])
        words = [f"train.output_dir={folder}", *opts] if lazy else [*SMALL, *OPTS, "OUTPUT_DIR", folder, *opts]
        command = [*launcher, HERE / "torchrun_process.py", *flags, *words]
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **environment)
        if lazy:
            environment["LAZY"] = "1"
        if misbehave:
            environment["MISBEHAVE"] = f"{misbehave} {folder}.once"
        log = open(f"{folder}.log", "a")  # noqa: SIM115
        process = subprocess.Popen([str(x) for x in command], stdout=log, stderr=log, env=environment)
        begun.append(process)
        return process

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()


def ended(process, folder, *, well=True, seconds=300):
    """The exit status."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"hangs:\n{log_of(folder)[-4000:]}") from None
    assert not well or status == 0, log_of(folder)[-4000:]
    return status


def wait_for_port(port):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on port {port}")


def log_of(folder):
    return Path(f"{folder}.log").read_text()


def outcome(folder):
    """Weights, momentum, transitions, logged rows."""
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    events = [{**json.loads(line), "seconds": 0} for line in (folder / "repr_events.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if "time" not in k and "eta" not in k} for row in rows]
    return saved["model"], saved["trainer"]["_trainer"]["optimizer"]["state"], events, rows


def assert_same(a, b):
    for name, value in a[0].items():
        assert torch.equal(value, b[0][name]), name
    for number, state in a[1].items():
        assert torch.equal(state["momentum_buffer"], b[1][number]["momentum_buffer"])
    assert a[2:] == b[2:]


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """The undisturbed run, of two processes by --num-gpus."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    ended(train(folder), folder)
    return outcome(folder)


def test_torchrun_is_num_gpus(train, straight, tmp_path):
    ended(train(tmp_path / "run", "--standalone", "--nproc_per_node", 2), tmp_path / "run")
    assert "World size: 2" in log_of(tmp_path / "run")
    assert_same(outcome(tmp_path / "run"), straight)


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_killed_rank_is_started_again(train, straight, tmp_path, round_):
    rng = random.Random(round_)
    folder, rank, iteration = tmp_path / "run", rng.choice([0, 1]), rng.randint(4, 10)
    words = ("--standalone", "--nproc_per_node", 2, "--max-restarts", 3)
    ended(train(folder, *words, misbehave=f"kill {rank} {iteration} {rng.uniform(0, 0.1)}"), folder)
    assert Path(f"{folder}.once").exists()
    assert_same(outcome(folder), straight)


@pytest.mark.parametrize(("by", "how"), [("torchrun", "term"), ("torchrun", "kill-agent"), ("num-gpus", "term")])
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_stopped_job_goes_on_with_the_same_command(train, straight, tmp_path, round_, by, how):
    """SIGTERM to the agent, as Slurm sends it before it takes the machine, and an agent that is killed."""
    rng = random.Random(100 + round_)
    folder, rank, iteration = tmp_path / "run", rng.choice([0, 1]), rng.randint(3, 8)
    moment = rng.uniform(0, 0.1)
    words = ("--standalone", "--nproc_per_node", 2) if by == "torchrun" else ()
    first = train(folder, *words, resume=True, misbehave=f"{how} {rank} {iteration} {moment}")
    status = ended(first, folder, well=False)
    # torchrun ends with a traceback and 1, or aborted where its store is still at work.
    assert status == 75 if not words else status != 0, log_of(folder)
    if how == "term":
        saved = int((folder / "last_checkpoint").read_text()[6:13])
        assert saved in range(iteration, 11), log_of(folder)
        assert log_of(folder).count("stopped by SIGTERM with status 75") == 1
    ended(train(folder, *words, resume=True), folder)
    assert_same(outcome(folder), straight)


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_two_agents_of_which_one_is_killed_and_comes_back(train, straight, tmp_path, round_):
    """Two agents on the loopback address stand in for two machines; the one that keeps the rendezvous stays."""
    rng = random.Random(200 + round_)
    folder, iteration = tmp_path / "run", rng.randint(4, 10)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--nnodes", 2, "--nproc_per_node", 1, "--max-restarts", 3, "--rdzv-backend", "c10d", "--rdzv-id", "job"]
    words += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "join_timeout=90"]
    # torch 2.14's agents share the store of their first round, which an agent that comes later does not find.
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first = train(folder, *words, **apart)
    wait_for_port(port)  # the first to come keeps the rendezvous
    second = train(folder, *words, misbehave=f"kill-agent any {iteration} {rng.uniform(0, 0.1)}", **apart)
    assert ended(second, folder, well=False) == -signal.SIGKILL
    again = train(folder, *words, **apart)
    ended(first, folder)
    ended(again, folder)
    assert_same(outcome(folder), straight)


def test_another_number_of_ranks(train, tmp_path):
    """Two ranks, stopped in the sub-network phase of the second cycle and in the second epoch, go on as one; that one,
    stopped in the third epoch, as two. 12 images: an epoch is 6 iterations."""
    folder, opts = tmp_path / "run", ["SOLVER.MAX_ITER", 17]
    stops = {2: "term 0 6 0", 1: "term 0 13 0"}
    first = train(folder, "--standalone", "--nproc_per_node", 2, misbehave=stops[2], opts=opts)
    assert ended(first, folder, well=False) != 0
    for number, epoch, warning in (
        (1, 1, "number of processes was 2 and is 1; number of images per process and batch was 1 and is 2"),
        (2, 2, "number of processes was 1 and is 2; number of images per process and batch was 2 and is 1"),
    ):
        Path(f"{folder}.once").unlink()
        log_before, told = len(log_of(folder)), tmp_path / f"told{number}"
        told.mkdir()
        saved = torch.load(folder / (folder / "last_checkpoint").read_text(), weights_only=True)
        words = ["--standalone", "--nproc_per_node", number]
        job = train(folder, *words, resume=True, misbehave=stops[1] if number == 1 else "", opts=opts, TELL=str(told))
        assert (ended(job, folder, well=number == 2) == 0) == (number == 2)

        begun = torch.load(told / "start.pth", weights_only=True)
        hooks, hooks_saved = begun["trainer"]["hooks"], saved["trainer"]["hooks"]
        for name in ("RePrHook", "LRScheduler"):
            assert_equal(hooks[name], hooks_saved[name])
        assert any(mask.any() for mask in hooks["RePrHook"]["scheme"]["masks"].values()) == (number == 1)
        assert_equal(begun["trainer"]["_trainer"], saved["trainer"]["_trainer"])
        assert_equal(begun["model"], saved["model"])

        log = log_of(folder)[log_before:]
        assert log.count("the data order of this run starts over") == 1
        assert f"{warning}: the data order of this run starts over at its epoch" in log
        seed = hooks_saved["ExactResume"]["ranks"][0]["loaders"][0]["sampler"]["_seed"]
        for rank in range(number):
            batches = [json.loads(line) for line in (told / f"rank{rank}.json").read_text().splitlines()]
            assert batches == order_from(epoch, seed, rank, number, len(batches))
    events = [json.loads(line) for line in (folder / "repr_events.jsonl").read_text().splitlines()]
    assert [(e["iteration"], e["event"]) for e in events] == [(1, "drop"), (3, "restore"), (5, "drop"), (7, "restore")]


def order_from(epoch, seed, rank, size, number):
    """The first batches of one rank from an epoch on; of 2 images, all as wide or all upright (even and odd ids)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [i for _ in range(epoch + 3) for i in torch.randperm(12, generator=generator).tolist()]
    batches, waiting = [], {0: [], 1: []}
    for image in drawn[12 * epoch :][rank::size]:
        waiting[image % 2].append(image)
        if len(waiting[image % 2]) == 2 // size:
            batches.append(waiting[image % 2])
            waiting[image % 2] = []
    return batches[:number]


def assert_equal(a, b):
    """Nested dicts, lists and tensors."""
    if torch.is_tensor(b):
        assert torch.equal(a, b)
    elif isinstance(b, dict):
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert_equal(a[key], value)
    elif isinstance(b, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_torchrun_is_num_gpus_with_a_lazy_config(train, tmp_path):
    (tmp_path / "small.py").write_text(SMALL_LAZY + "del dataloader.evaluator\n")
    results = []
    for words in ((), ("--standalone", "--nproc_per_node", 2)):
        folder = tmp_path / f"run{len(results)}"
        opts = ["dataloader.train.total_batch_size=2", "train.max_iter=4"]
        ended(train(folder, *words, lazy=tmp_path / "small.py", opts=opts), folder)
        assert "World size: 2" in log_of(folder)
        results.append(outcome(folder))
    assert_same(*results)
