"""examples/ as a user runs them: a process of their own in which Detectron2 cannot be imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_DETECTRON2 = """
import runpy, sys
sys.modules["detectron2"] = sys.modules["fvcore"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_DETECTRON2, str(ROOT / "examples" / "plain_pytorch.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_plain_pytorch_trains_both_arms_and_asks_the_oracle():
    done = run("--seeds", 1, 2, "--epochs", 15, "--train-images", 300, "--lr", 0.05, "--oracle")
    assert done.returncode == 0, done.stderr
    seeds = dict(re.findall(r"seed (\d): test accuracy (.*) \(", done.stdout))
    accuracy = {
        seed: [float(x) for x in re.fullmatch(r"baseline ([\d.]+), RePr ([\d.]+)", both).groups()]
        for seed, both in seeds.items()
    }
    assert set(accuracy) == {"1", "2"} and all(30 < x <= 100 for both in accuracy.values() for x in both)
    for number, arm in enumerate(("baseline", "RePr")):
        mean, deviation = map(float, re.search(rf"^{arm} .* ([\d.]+) \+- ([\d.]+)$", done.stdout, re.M).groups())
        values = [accuracy[seed][number] for seed in ("1", "2")]
        assert mean == pytest.approx(sum(values) / 2, abs=0.011)
        assert deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=0.011)
    difference = float(re.search(r"^RePr - baseline .* ([+-][\d.]+) \+-", done.stdout, re.M).group(1))
    assert difference == pytest.approx(sum(b - a for a, b in accuracy.values()) / 2, abs=0.011)
    table = done.stdout.partition("rank correlation with the oracle")[2]
    for name in ("ortho", "taylor", "hessian", "apoz", "random"):
        assert -1 <= float(re.search(rf"^{name} +([+-][\d.]+)", table, re.M).group(1)) <= 1


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--criterion", "nope"], "REPR.CRITERION must be one of"),
        (["--train-images", 5000], "--train-images must be 50 to 1297, got 5000"),
        (["--epochs", 1, "--train-images", 50], "REPR.S1_ITERS must be an integer of at least 1, got 0"),
    ],
)
def test_plain_pytorch_says_in_one_line_what_is_wrong(args, line):
    done = run(*args)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1
