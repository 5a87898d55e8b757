"""Runs that are killed with SIGKILL and resumed end with the weights of the run that was not, bit for bit."""

import os
import random
import signal
import threading

import forked
import pytest
from outcomes import assert_same, outcome, train_words

OPTS = "SOLVER.MAX_ITER 14 REPR.ENABLED True REPR.S1_ITERS 3 REPR.S2_ITERS 3 REPR.NUM_CYCLES 2".split()
OPTS += "SOLVER.CHECKPOINT_PERIOD 2 TEST.EVAL_PERIOD 6".split()
# (moment, first, last): the run is killed the first time that the moment comes at or after an iteration drawn from the
# range. Drops end iterations 2 and 8, restores 5 and 11, evaluations 5, 11 and 13, checkpoints every second one.
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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_killed_and_resumed_bit_for_bit(tiny_data, tmp_path, workers, round_):
    def trained(name, resume=False, moment="", iteration=0, after=None):
        """Trains; True if the run was killed."""
        flags = ["--resume"] if resume else []
        words = train_words(tiny_data, tmp_path / name, *OPTS, "DATALOADER.NUM_WORKERS", workers, flags=flags)
        command = forked.Command(
            words, f"{tmp_path / name}.log", before="misbehaviour:kill_at", arguments=(moment, iteration)
        )
        if after is not None:
            threading.Timer(after, command.process.kill).start()
        status = command.status()
        assert status in (0, -signal.SIGKILL), command.text[-3000:]
        return status != 0

    assert not trained("straight")
    rng = random.Random(1000 * round_ + workers)
    moments = MOMENTS if round_ else MOMENTS[bool(workers) :: 2]  # half of them with workers, half without
    kills = [{"moment": moment, "iteration": rng.randint(first, last)} for moment, first, last in moments]
    for _ in range(2 * round_):
        kills.insert(rng.randrange(len(kills)), {"after": rng.uniform(0.2, 1.8)})
    done = 0
    for kill in kills:
        if not trained("killed", done > 0, **kill):
            assert round_ > 0, f"the run never came to {kill}"
            break  # a kill that comes by the clock let it run past this moment, to the end
        done += 1
    else:
        assert not trained("killed", resume=True)
    print(f"{done} kills")
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "straight"))
