#!/usr/bin/env python
"""Better filters, or less training? Every RePr network of the CIFAR-10 study beside its standard one at the same fit.

docs/evidence/cifar10_equal_fit.py [cifar10.jsonl]

A network that is trained past its best epoch gains test accuracy by being set back. So RePr's end is compared with two
moments of the standard network of the same seed and settings: its end, and the first epoch at which it fitted the
training images as well as the RePr network does at its end. Accuracies are means of the last 5 % of the epochs, and of
three measurements around that moment.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from cifar.records import Settings, group, read, tail_epochs
from cifar.training import OPTIMIZERS
from cifar10 import DEFAULTS
from telling import markdown

RUNS = Path(__file__).with_name("cifar10.jsonl")
AROUND = 1
EARLY = 5  # percent of the training: a shorter S1 is named
_LABELLED = ("weight_decay", "dropout", "distill", "ortho_reg", "duplicates", "dead", "warm_images")
# Field of RePr -> its label if it is not the paper's.
_OF_REPR = {"drop_ratio": "{:g} % dropped", "max_drop_per_layer": "at most {:g} % of a layer"}


class Fit(NamedTuple):
    """Training and test accuracy in percent; ``epoch`` where they are of a moment."""

    train: float
    test: float
    epoch: int | None = None


def course(run: dict[str, Any]) -> list[Fit]:
    """The training accuracy is known after every epoch, the test accuracy after those of ``curve_epochs``."""
    return [
        Fit(run["train_curve"][epoch - 1], test, epoch)
        for epoch, test in zip(run["curve_epochs"], run["curve"], strict=True)
    ]


def mean(fits: list[Fit], epoch: int | None = None) -> Fit:
    return Fit(statistics.mean(fit.train for fit in fits), statistics.mean(fit.test for fit in fits), epoch)


def end(run: dict[str, Any]) -> Fit:
    last = tail_epochs(run)
    return mean([fit for fit in course(run) if fit.epoch in last])


def first_at(run: dict[str, Any], train: float) -> Fit | None:
    """The first moment at which the training accuracy is at least ``train``; None where it never is."""
    fits = course(run)
    for place, fit in enumerate(fits):
        around = mean(fits[max(0, place - AROUND) : place + AROUND + 1], fit.epoch)
        if around.train >= train:
            return around
    return None


def pairs(runs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(standard, RePr) runs of the same seed and settings, RePr's own aside; not those that are the same run, for
    nothing was dropped."""
    found = []
    for way, arms in group([(Settings(**run["settings"]), run) for run in runs]).items():
        standard = arms.get(way, {})
        others = [arm for settings, arm in arms.items() if settings != way]
        found += [(standard[seed], run) for arm in others for seed, run in arm.items() if seed in standard]
    return [(standard, run) for standard, run in found if standard["curve"] != run["curve"]]


def line(standard: dict[str, Any], run: dict[str, Any]) -> list[str]:
    settings = run["settings"]
    more = [f"{k} {settings[k]:g}" for k in _LABELLED if settings.get(k)]
    if settings["lr"] != OPTIMIZERS[settings["optimizer"]][2]:
        more.insert(0, f"lr {settings['lr']:g}")
    released = settings.get("network", "3x3") == DEFAULTS["released"]["network"]
    usual = DEFAULTS["released" if released else "paper"]
    more += [label.format(100 * settings[k]) for k, label in _OF_REPR.items() if settings.get(k, usual[k]) != usual[k]]
    if settings.get("skip_first"):
        more.append("first conv not ranked")
    if not released and settings.get("s1", EARLY) < EARLY:
        more.append("early short cycles")
    ours, theirs = end(run), end(standard)
    same = first_at(standard, ours.train)
    first = "the released code's setting" if released else settings["optimizer"]
    name = ", ".join([f"{settings['train_images']:,} images", first, *more])
    found = [name, settings["row"], str(settings["seed"]), f"{ours.train:.1f}, {ours.test:.1f}"]
    found += [f"{theirs.train:.1f}, {theirs.test:.1f}", f"{ours.test - theirs.test:+.1f}"]
    if same is None:
        return [*found, "never", ""]
    return [*found, f"epoch {same.epoch}: {same.test:.1f}", f"{ours.test - same.test:+.1f}"]


def runs(file: Path = RUNS) -> list[dict[str, Any]]:
    return [run for _, run in read(file)]


def table(runs: list[dict[str, Any]]) -> str:
    """Every pair, a line each."""
    lines = sorted((line(*pair) for pair in pairs(runs)), key=lambda x: (x[0].startswith("50"), *x[:3]))
    head = ["setting", "row", "seed", "RePr: train, test", "standard at its end", "RePr - it"]
    return markdown([*head, "standard at the same fit", "RePr - it"], lines)


def differences(runs: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Number of images -> test accuracy of RePr minus that of the standard network at the same fit, in every pair.

    Pairs with planted filters do not count, nor those whose standard network never fitted as well.
    """
    found: dict[int, list[float]] = {}
    unplanted = [run for run in runs if not (run["settings"].get("duplicates") or run["settings"].get("dead"))]
    for standard, ours in pairs(unplanted):
        if difference := line(standard, ours)[-1]:
            found.setdefault(ours["settings"]["train_images"], []).append(float(difference))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", default=RUNS)
    found = runs(parser.parse_args().runs)
    print(table(found))
    for images, values in sorted(differences(found).items()):
        worse, by = sum(value < 0 for value in values), statistics.mean(values)
        print(f"{images:,} images, nothing planted: RePr tests worse in {worse} of {len(values)} pairs, {by:+.1f}")


if __name__ == "__main__":
    main()
