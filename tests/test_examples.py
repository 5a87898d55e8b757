"""examples/ as a user runs them, in a process of their own in which Detectron2 cannot be imported."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "plain_pytorch.py"
WITHOUT_DETECTRON2 = """
import os, runpy, sys
sys.modules["detectron2"] = sys.modules["fvcore"] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_plain_pytorch_trains_both_arms_and_asks_the_oracle():
    options = "--seeds 1 2 --epochs 15 --train-images 300 --lr 0.05 --oracle --norm BN --scheme scale=unit".split()
    command = [sys.executable, "-c", WITHOUT_DETECTRON2, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
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
    for name in ("ortho", "apoz", "random"):
        assert -1 <= float(re.search(rf"^{name} +([+-][\d.]+)", table, re.M).group(1)) <= 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--scheme criterion=nope", "criterion= must be one of apoz, "),
        ("--scheme scale=long", "scale= must be one of kept, "),
        (
            "--scheme ratio=0.3",
            "--scheme takes KEY=VALUE with a KEY of criterion, drop_ratio, max_drop_per_layer, scale, ",
        ),
        ("--scheme drop_ratio=some", "--scheme drop_ratio must be a number, got 'some'"),
        ("--train-images 5000", "--train-images must be 50 to 1297, got 5000"),
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--epochs 1 --train-images 50", "s1_iters= must be an integer of at least 1, got 0"),
    ],
)
def test_plain_pytorch_says_in_one_line_what_is_wrong(monkeypatch, capsys, options, line):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options.split(), "--seeds", "1"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and line in error and error.count("\n") == 1


def test_accuracy_with_bn_is_that_of_the_running_statistics():
    script = runpy.run_path(str(SCRIPT))
    training, _, test = script["digits"](100)
    torch.manual_seed(0)
    model = script["c3_32"]("BN")
    for _ in range(3):
        model(training[0])
    mean = model[1].running_mean.clone()
    script["accuracy"](model, test)
    assert torch.equal(model[1].running_mean, mean)
    assert model.training

    model.eval()
    correct = sum(int(model(x[None]).argmax()) == int(y) for x, y in zip(*test, strict=True))
    model.train()
    assert script["accuracy"](model, test) == pytest.approx(100 * correct / len(test[0]), abs=1e-4)
