"""Runs that are killed with SIGKILL and resumed end with the weights of the run that was not, bit for bit."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
OPTS = (
    "SOLVER.MAX_ITER 14 REPR.ENABLED True REPR.S1_ITERS 3 REPR.S2_ITERS 3 REPR.NUM_CYCLES 2 SOLVER.CHECKPOINT_PERIOD 2 "
    "TEST.EVAL_PERIOD 6"
).split()
# (moment, first iteration, last iteration): the run is killed the first time that the moment comes at or after an
# iteration drawn from the range. S1 is iterations 0-2 and 6-8, S2 3-5 and 9-11; drops end 2 and 8, restores 5 and 11,
# evaluations 5, 11 and the run, checkpoints every second iteration.
MOMENTS = [
    ("step", 0, 2),
    ("drop", 0, 2),
    ("step", 3, 4),
    ("restore", 3, 5),
    ("save", 4, 5),
    ("evaluation", 4, 5),
    ("tag", 6, 7),
    ("before hooks", 6, 8),
    ("drop", 6, 8),
    ("step", 9, 10),
    ("restore", 9, 11),
    ("evaluation", 10, 11),
    ("save", 12, 13),
    ("final", 12, 13),  # the last checkpoint is written, the final one not
    ("evaluation", 12, 13),
]
ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))  # `make soak` sets more


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, str(HERE / "training_process.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.stdin.close()
    process.wait(60)


def trained(server, data, folder, opts, resume=False, kill=None):
    order = {
        "opts": [*opts, "OUTPUT_DIR", str(folder)],
        "json": str(data / "tiny.json"),
        "images": str(data / "images"),
        "resume": resume,
        "kill": kill,
        "log": str(folder) + ".log",
    }
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline())
    if not answer["killed"] and answer["status"]:
        raise AssertionError(f"the run failed:\n{Path(order['log']).read_text()[-3000:]}")
    return answer["killed"]


def outcome(folder):
    state = torch.load(folder / "model_final.pth", weights_only=True)
    events = [{**json.loads(line), "seconds": 0} for line in (folder / "repr_events.jsonl").read_text().splitlines()]
    logged = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        row = json.loads(line)
        assert row["iteration"] not in logged
        logged[row["iteration"]] = {k: v for k, v in sorted(row.items()) if "time" not in k and "eta" not in k}
    return (
        state["model"],
        state["trainer"]["_trainer"]["optimizer"]["state"],
        events,
        logged,
    )


def assert_same(a, b):
    for x, y in zip(a[:2], b[:2], strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if torch.is_tensor(x[name]):
                assert torch.equal(x[name], y[name]), name
            else:
                assert all(torch.equal(x[name][k], y[name][k]) for k in x[name]), name
    assert a[2] == b[2]
    assert repr(a[3]) == repr(b[3])  # NaN where no such objects exist


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_killed_and_resumed_bit_for_bit(server, tiny_data, tmp_path, workers, round_):
    opts = [*OPTS, "DATALOADER.NUM_WORKERS", str(workers)]
    assert not trained(server, tiny_data, tmp_path / "straight", opts)
    rng = random.Random(1000 * round_ + workers)
    kills = [{"at": moment, "iteration": rng.randint(first, last)} for moment, first, last in MOMENTS]
    for _ in range(2 * round_):
        kills.insert(rng.randrange(len(kills)), {"after_seconds": rng.uniform(0.2, 1.8)})
    done = 0
    for kill in kills:
        if not trained(server, tiny_data, tmp_path / "killed", opts, done > 0, kill):
            assert round_ > 0, f"the run never came to {kill}"
            break  # a kill that comes by the clock let it run past this moment, to the end
        done += 1
    else:
        assert not trained(server, tiny_data, tmp_path / "killed", opts, resume=True)
    print(f"{done} kills")
    assert_same(outcome(tmp_path / "straight"), outcome(tmp_path / "killed"))
