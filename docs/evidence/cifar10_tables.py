#!/usr/bin/env python
"""The tables of the CIFAR-10 study, from cifar10.jsonl in this folder.

docs/evidence/cifar10_tables.py

A line of a table is told by the options with which examples/cifar10.py trains it; every seed that is there counts.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from telling import interval, markdown, spread

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import cifar10
from cifar.records import read
from cifar.report import tail

from repr_det.studies.comparison.statistics import Difference, paired_difference

RUNS = Path(__file__).with_name("cifar10.jsonl")
SEEDS = range(20)
MEDIUM = "--train-images 10000"
SMALL = "--train-images 5000 --epochs 60"
SHORT = "--train-images 25000 --epochs 12 --s1 13 --s2 7"
TABLE_1 = ["random", "weight_norm", "ortho", "taylor", "hessian", "apoz", "gradient", "mean_activation"]
# What is told -> options of both arms, and what RePr alone differs in.
ABLATIONS = {
    "SGD with momentum, 30 % dropped": ("", ""),
    "10 % dropped": ("", "--drop-ratio 0.1"),
    "50 % dropped": ("", "--drop-ratio 0.5"),
    "first conv not ranked": ("", "--skip-first"),
    "no cap (the first drop takes 28 of the first conv's 32 filters)": ("", "--max-drop-per-layer 1"),
    "plain SGD, 0.05": ("--optimizer sgd", ""),
    "RMSProp": ("--optimizer rmsprop", ""),
    "Adam": ("--optimizer adam", ""),
    "dropout of 0.5": ("--dropout 0.5", ""),
    "orthogonality regulariser of 0.01": ("--ortho-reg 0.01", ""),
    "distillation from a larger network, weight 0.5": ("--distill 0.5", ""),
}
PLANTED = {
    "nothing": ("", ["ortho", "redundant"]),
    "half copies": ("--duplicates 0.5", ["random", "ortho", "redundant"]),
    "three quarters copies": ("--duplicates 0.75", ["random", "ortho", "redundant"]),
    "three quarters dead": ("--dead 0.75", ["apoz", "ortho", "redundant"]),
}
BY_ITSELF = {
    "Adam, 0.005": ("--optimizer adam --lr 0.005", ["redundant"]),
    "Adam, 0.01": ("--optimizer adam --lr 0.01", ["redundant"]),
    "Adam, 0.001, its usual rate": ("--optimizer adam", ["redundant"]),
    "begun with the weights of 60 epochs on 5,000 of the images": (
        "--warm-images 5000 --warm-epochs 60", ["ortho", "redundant"],
    ),
}  # fmt: skip

Record = dict[str, Any]
Arm = dict[int, Record]  # seed -> record
Value = Callable[[Record], float]


class Study:
    """The runs of a file, found by the options that train them."""

    def __init__(self, file: Path = RUNS) -> None:
        self.records = {settings.key: record for settings, record in read(file)}
        (self.digest,) = {record["settings"]["data"] for record in self.records.values()}

    def arm(self, row: str, options: str = "") -> Arm:
        args = cifar10.parse([*options.split(), "--rows", row, "--seeds", *map(str, SEEDS)])
        runs = {settings.seed: settings.key for settings in cifar10.plan(args, self.digest)}
        return {seed: self.records[key] for seed, key in runs.items() if key in self.records}


def last(record: Record) -> float:
    return record["final"]


def difference(standard: Arm, other: Arm, value: Value) -> Difference | None:
    seeds = sorted(set(standard) & set(other))
    if not seeds:
        return None
    return paired_difference(*([value(arm[seed]) for seed in seeds] for arm in (standard, other)))


def medium(study: Study) -> str:
    """10,000 images: every criterion, mean of the last five epochs."""
    standard = study.arm("standard", MEDIUM)
    lines = []
    for row in ["standard", *TABLE_1]:
        arm = study.arm(row, MEDIUM)
        by_seed = [f"{tail(arm[seed]):.1f}" if seed in arm else "" for seed in range(3)]
        other = "" if row == "standard" else interval(difference(standard, arm, tail))
        lines.append([_row(row), *by_seed, spread(map(last, arm.values())), spread(_best(arm)), other])
    head = ["10,000 images", "seed 0", "seed 1", "seed 2", "last epoch", "best epoch", "RePr - standard (95 % CI)"]
    return markdown(head, lines)


def whole(study: Study) -> str:
    """All 50,000 images, seed by seed, mean of the last five epochs."""
    lines = []
    for told, options in {"SGD with momentum": "", "plain SGD (bf16)": "--optimizer sgd --lr 0.01 --bf16"}.items():
        standard = study.arm("standard", options)
        for row in TABLE_1:
            for seed, record in study.arm(row, options).items():
                pair = [standard[seed], record]
                first = [told, _row(row), str(seed), *(f"{tail(r):.1f}" for r in pair)]
                second = [f"{r['best']:.1f} (epoch {r['best_epoch']})" for r in pair]
                second += [f"{r['train']:.1f}" for r in pair]
                both = [", ".join(x) for x in ([f"{last(r):.1f}" for r in pair], second[:2], second[2:])]
                lines.append([*first, f"{tail(record) - tail(standard[seed]):+.1f}", *both])
    head = ["all 50,000 images", "form", "seed", "standard", "RePr", "difference", "last epoch", "best epoch"]
    return markdown([*head, "training accuracy"], lines)


def ablations(study: Study) -> str:
    """5,000 images and 60 epochs, mean of the last 5 % of the epochs."""
    lines = []
    for told, (both, own) in ABLATIONS.items():
        standard, ortho = study.arm("standard", f"{SMALL} {both}"), study.arm("ortho", f"{SMALL} {both} {own}")
        if ortho:
            fits = ", ".join(f"{statistics.mean(r['train'] for r in arm.values()):.0f}" for arm in (standard, ortho))
            alone = "" if own else spread(map(tail, standard.values()))
            others = [spread(map(tail, ortho.values())), interval(difference(standard, ortho, tail)), fits]
            lines.append([told, alone, *others])
    return markdown(["setting", "standard", "RePr (ortho)", "RePr - standard (95 % CI)", "training accuracy"], lines)


def released(study: Study) -> str:
    """The setting of the author's code on 5,000 images and 95 epochs, mean of the last 5 % of the epochs."""
    options = "--setting released --train-images 5000 --epochs 95"
    standard = study.arm("standard", options)
    lines = []
    for row in ("standard", "ortho_released", "redundant"):
        if arm := study.arm(row, options):
            other = "" if row == "standard" else interval(difference(standard, arm, tail))
            fit = f"{statistics.mean(r['train'] for r in arm.values()):.0f}"
            lines.append([_row(row), str(len(arm)), spread(map(tail, arm.values())), spread(_best(arm)), fit, other])
    head = ["the released code's setting", "seeds", "test accuracy", "best epoch", "training accuracy"]
    return markdown([*head, "RePr - standard (95 % CI)"], lines)


def planted(study: Study) -> str:
    """Redundancy that was planted: 25,000 images and 12 epochs, last epoch."""
    return _short(study, "planted", PLANTED)


def by_itself(study: Study) -> str:
    """Redundancy that was not: 25,000 images and 12 epochs, last epoch."""
    return _short(study, "setting", BY_ITSELF)


def _short(study: Study, head: str, settings: dict[str, tuple[str, list[str]]]) -> str:
    lines = []
    for told, (options, rows) in settings.items():
        standard = study.arm("standard", f"{SHORT} {options}")
        lines.append([told, "standard", str(len(standard)), spread(map(last, standard.values())), ""])
        for row in rows:
            if arm := study.arm(row, f"{SHORT} {options}"):
                test = spread(map(last, arm.values()))
                lines.append(["", row, str(len(arm)), test, interval(difference(standard, arm, last))])
    return markdown([head, "form", "seeds", "test accuracy", "form - standard (95 % CI)"], lines)


def _best(arm: Arm) -> list[float]:
    return [record["best"] for record in arm.values()]


def _row(row: str) -> str:
    return row if row == "standard" else f"RePr, {row.replace('_', ' ')}"


def main() -> None:
    study = Study()
    for table in (whole, medium, ablations, released, planted, by_itself):
        print(table.__doc__, table(study), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
