"""tools/benchmark.py: its arithmetic against closed forms and counts, and the whole command on a tiny detector."""

import collections
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import benchmark
import numpy as np
import pytest
import torch
from benchmark import S1, S2, STOCK, Detector, parse
from conftest import R18, ROOT, SMALL, refused

TINY = ["--config-file", str(ROOT / "configs" / "repr_r50_fpn.yaml"), "--size", "64", *SMALL]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "32"], "--size must be a side or HEIGHTxWIDTH, such as 320 or 800x1333, of 64 or more, got '32'"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--output", __file__], "is a file, not a folder"),
        (["SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED needs --device cuda"),
    ],
)
def test_wrong_arguments(flags, message):
    assert message in refused(parse, flags)


def test_ratios_are_those_of_a_round():
    rng = np.random.default_rng(1)
    machine = rng.uniform(1, 3, 11)  # a shared machine: each round is as slow as the others make it
    seconds = {STOCK: list(machine), S1: list(1.01 * machine), S2: list(rng.normal(1.1, 0.1, 11) * machine)}
    stock, first, second = benchmark.compare("step", seconds)
    quartiles = [stock[key] for key in ("q1", "median", "q3")]
    assert "to_stock" not in stock and quartiles == pytest.approx(np.percentile(machine, [25, 50, 75]))
    assert first["to_stock"] == pytest.approx({"median": 1.01, "q1": 1.01, "q3": 1.01})
    assert second["to_stock"]["q3"] == pytest.approx(np.percentile(np.divide(seconds[S2], machine), 75))


def test_share_of_a_run():
    drop, restore, run_1x, run_3x = benchmark.transition_rows({"drop": [2.0, 4.0], "restore": [6.0, 8.0]}, 0.5, 3)
    assert drop["median"] == 3 and restore["to_stock"]["median"] == 14
    assert run_1x["unit"] == "%" and run_1x["median"] == pytest.approx(100 * 3 * (3 + 7) / (90_000 * 0.5))
    assert run_3x["median"] == pytest.approx(run_1x["median"] / 3)


def test_flops_are_those_of_every_output_of_every_conv():
    _, cfg, size = parse([*TINY])
    detector = Detector(cfg, size, with_repr=True)
    detector.step()
    macs = collections.Counter()

    def count(conv, _, output):
        if isinstance(conv, torch.nn.Conv2d):
            macs[conv] += output.numel() * conv.weight[0].numel() / 1e9

    with torch.nn.modules.module.register_module_forward_hook(count):
        detector.model.eval()([{"image": detector.batch[0]["image"]}])
    layers = detector.hook.scheme.layers
    every, ours, zero = benchmark.flop_rows(detector, {x.name: (x.num_filters // 4, x.num_filters) for x in layers})
    assert every["median"] == pytest.approx(sum(macs.values()), rel=1e-6)
    assert ours["median"] == pytest.approx(sum(macs[layer.conv] for layer in layers), rel=1e-6)
    assert zero["to_stock"]["median"] == pytest.approx(ours["median"] / 4 / every["median"], rel=1e-6)


def test_peak_memory():
    without = benchmark.peak_of(lambda: None, "cpu")
    with_them = benchmark.peak_of(lambda: np.ones(2**25), "cpu")  # 256 MiB, freed at once
    assert 2**27 < with_them - without < 2**29 and benchmark.peak_of(lambda: None, "cpu") < with_them


def test_whole_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda number, mp_context: ThreadPoolExecutor(number))
    benchmark.main(["--pairs", "1", "--clock", "cpu", "--repeats", "1", "--output", str(tmp_path / "out"), *TINY])
    results = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    text = (tmp_path / "out" / "benchmark.txt").read_text()
    assert text in capsys.readouterr().out
    rows = {row["what"]: row for row in results["rows"]}
    assert rows["filters dropped in S2"]["median"] == int(0.3 * rows["filters of RePr's layers"]["median"])
    steps = [f"step, {arm}" for arm in (STOCK, S1, S2)]
    wanted = [*steps, "drop", "restore", *(x.replace("step", "prediction") for x in steps), "dropped filters"]
    assert set(wanted) < set(rows) and all(what in text for what in rows)
    assert all(rows[what]["median"] > 0 and rows[what]["q1"] <= rows[what]["q3"] for what in rows)
    assert all(rows[f"memory, {what}"]["median"] > 100 for what in (*steps, "drop", "restore"))


@pytest.mark.slow
def test_memory_is_that_of_processes_of_their_own(tmp_path):
    command = [sys.executable, ROOT / "tools" / "benchmark.py", "--output", tmp_path, *TINY, *R18, "--only", "memory"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode and "memory, restore" in done.stdout, done.stderr
