#!/usr/bin/env python
"""The tables of the CIFAR-10 study, from cifar10.jsonl in this folder.

docs/evidence/cifar10_tables.py

A line of a table is given by the options with which docs/evidence/cifar10.py trains it; every seed counts.
"""

import statistics
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import cifar10
from cifar.records import read, tail
from telling import interval, markdown, paired, spread

RUNS = Path(__file__).with_name("cifar10.jsonl")
SEEDS = range(20)
WHOLE = {"plain SGD (bf16): ": "--optimizer sgd --lr 0.01 --bf16", "SGD with momentum: ": ""}
SMALL = "--train-images 5000 --epochs 60"
SHORT = "--train-images 25000 --epochs 12 --s1 13 --s2 7"
TABLE_1 = ["random", "weight_norm", "ortho", "taylor", "hessian", "apoz", "gradient", "mean_activation"]
# Label -> options of both, and of RePr only.
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
# For docs/results.md: label -> options of both, rows of RePr.
SUMMARY = {
    "50,000 images, 100 epochs": (WHOLE["plain SGD (bf16): "], ["ortho", "weight_norm", "random"]),
    "10,000 images, 100 epochs": ("--train-images 10000", ["ortho"]),
    "5,000 images, 60 epochs": (SMALL, ["ortho"]),
    "25,000 images, 12 epochs": (SHORT, ["ortho"]),
    "the same, three quarters of the filters copies": (f"{SHORT} --duplicates 0.75", ["ortho", "redundant"]),
    "the same, three quarters idle": (f"{SHORT} --dead 0.75", ["ortho", "redundant"]),
    "the same, nothing planted, Adam at five times its rate": (f"{SHORT} --optimizer adam --lr 0.005", ["redundant"]),
}

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


last: Value = itemgetter("final")
best: Value = itemgetter("best")


def versus(standard: Arm, other: Arm, value: Value) -> str:
    """The paired difference of ``value``; empty for the standard network itself."""
    of_seeds = ({seed: value(record) for seed, record in arm.items()} for arm in (standard, other))
    return "" if other is standard else interval(paired(*of_seeds))


def whole(study: Study) -> str:
    """All 50,000 images: mean of the last five epochs."""
    return _by_seed(study, "all 50,000 images", WHOLE)


def medium(study: Study) -> str:
    """10,000 images: every criterion, mean of the last five epochs."""
    return _by_seed(study, "10,000 images", {"": "--train-images 10000"})


def _by_seed(study: Study, head: str, settings: dict[str, str]) -> str:
    lines = []
    for label, options in settings.items():
        arms = {row: study.arm(row, options) for row in ["standard", *TABLE_1]}
        for row, arm in arms.items():
            if arm:
                tests = [f"{tail(arm[seed]):.1f}" if seed in arm else "" for seed in range(3)]
                others = [spread(map(last, arm.values())), spread(map(best, arm.values())), _fit(arm)]
                lines.append([label + _row(row), *tests, *others, versus(arms["standard"], arm, tail)])
    seeds = [f"seed {seed}" for seed in range(3)]
    ends = ["last epoch", "best epoch", "training accuracy", "RePr - standard (95 % CI)"]
    return markdown([head, *seeds, *ends], lines)


def ablations(study: Study) -> str:
    """5,000 images and 60 epochs, mean of the last 5 % of the epochs."""
    lines = []
    for label, (both, own) in ABLATIONS.items():
        standard, ortho = study.arm("standard", f"{SMALL} {both}"), study.arm("ortho", f"{SMALL} {both} {own}")
        if ortho:
            alone = "" if own else spread(map(tail, standard.values()))
            others = [spread(map(tail, ortho.values())), versus(standard, ortho, tail)]
            lines.append([label, alone, *others, f"{_fit(standard)}, {_fit(ortho)}"])
    return markdown(["setting", "standard", "RePr (ortho)", "RePr - standard (95 % CI)", "training accuracy"], lines)


def released(study: Study) -> str:
    """The setting of the author's code on 5,000 images and 95 epochs, mean of the last 5 % of the epochs."""
    options = "--setting released --train-images 5000 --epochs 95"
    arms = {row: study.arm(row, options) for row in ("standard", "ortho_released")}
    lines = []
    for row, arm in arms.items():
        tests = [spread(map(value, arm.values())) for value in (tail, best)]
        lines.append([_row(row), str(len(arm)), *tests, _fit(arm), versus(arms["standard"], arm, tail)])
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
    for label, (options, rows) in settings.items():
        arms = {row: study.arm(row, f"{SHORT} {options}") for row in ["standard", *rows]}
        for row, arm in arms.items():
            if arm:
                first = label if row == "standard" else ""
                test = spread(map(last, arm.values()))
                lines.append([first, row, str(len(arm)), test, versus(arms["standard"], arm, last)])
    return markdown([head, "form", "seeds", "test accuracy", "form - standard (95 % CI)"], lines)


def summary(study: Study) -> str:
    """The rows of SUMMARY, on seeds that both arms have: mean of the last 5 % of the epochs, of 12 the last."""
    lines = []
    for label, (options, rows) in SUMMARY.items():
        all_seeds = study.arm("standard", options)
        for row in rows:
            arm = study.arm(row, options)
            standard = {seed: record for seed, record in all_seeds.items() if seed in arm}
            tests = [spread(map(tail, each.values())) for each in (standard, arm)]
            lines.append([label if row == rows[0] else "", row.replace("_", " "), *tests, versus(standard, arm, tail)])
    return markdown(["data", "criterion", "standard", "RePr", "RePr - standard (95 % CI)"], lines)


def _fit(arm: Arm) -> str:
    return f"{statistics.mean(record['train'] for record in arm.values()):.0f}"


def _row(row: str) -> str:
    return row if row == "standard" else f"RePr, {row.replace('_', ' ')}"


def main() -> None:
    study = Study()
    for table in (summary, whole, medium, ablations, released, planted, by_itself):
        print(table.__doc__, table(study), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
