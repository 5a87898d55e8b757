"""The table of examples/cifar10.py from records that are given."""

import dataclasses
import json
import re

import numpy as np
from cifar import records, report
from cifar.records import Settings
from cifar_study import run_main, settings
from scipy import stats


def fake_run(row: str, seed: int, final: float, **options) -> tuple[Settings, dict]:
    # The last 5 % of 100 epochs are four of `final - 1` and the last one.
    curve = [10.0] * 95 + [final - 1] * 4 + [final]
    record = {"final": final, "best": final + 1, "train": 90.0, "diverged": None}
    record |= {"curve": curve, "curve_epochs": list(range(1, 101))}
    return settings(row=row, seed=seed, **options), record


def test_table_pairs_by_seed_and_keeps_ways_of_training_apart():
    values = {"standard": [70.0, 71.0, 72.5], "ortho": [73.0, 72.0, 75.0], "random": [71.0]}
    runs = [fake_run(row, seed, final) for row, finals in values.items() for seed, final in enumerate(finals)]
    runs += [fake_run("ortho", seed, 60.0 + seed, skip_first=True) for seed in (2, 7)]
    runs += [fake_run("standard", 0, 74.0, dropout=0.2), fake_run("ortho", 1, 76.0, dropout=0.2)]
    plain, dropped, overview = report.table(runs).split("\n\n")

    difference = np.subtract(values["ortho"], values["standard"])
    low, high = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference))
    mean, deviation = np.mean(values["ortho"]), np.std(values["ortho"], ddof=1)
    wanted = f"76.4     3  {mean:.2f} +- {deviation:.2f}  {mean - 0.8:.2f} +- {deviation:.2f}"
    line = next(line for line in plain.splitlines() if line.startswith("ortho skip_first False"))
    assert wanted in line and line.endswith(f"{difference.mean():+.2f} ({low:+.2f} to {high:+.2f})")
    # Of seeds 2 and 7 only one has a standard run.
    assert "ortho skip_first True" in plain and "-10.50 (one pair)" in plain
    assert re.search(r"^standard +72.1 +3 ", plain, re.M) and "drop_ratio 0.3" in plain
    assert "dropout 0.2" in dropped and "no standard run" in dropped
    names = [line.split("  ")[0] for line in overview.splitlines()[2:]]
    assert names == ["plain"] * 3 + ["dropout 0.2"]


def test_equal_pairs_have_no_interval():
    """What ``redundant`` gives where nothing is redundant."""
    records = [
        fake_run(row, seed, 60.0 + seed, train_images=50) for row in ("standard", "redundant") for seed in (0, 1)
    ]
    (line,) = [line for line in report.table(records).splitlines() if line.startswith("redundant")]
    assert line.count("+0.00 (2 equal pairs)") == 2


def test_only_report_trains_nothing(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, "--only-report", "--output", tmp_path)
    assert capsys.readouterr().out == "no finished runs\n"
    chosen, record = fake_run("standard", 0, 71.5)
    records.append(tmp_path / "runs.jsonl", {"settings": dataclasses.asdict(chosen), **record})
    assert json.loads((tmp_path / "runs.jsonl").read_text())["final"] == 71.5
    run_main(monkeypatch, "--only-report", "--output", tmp_path)
    assert "71.50" in capsys.readouterr().out
