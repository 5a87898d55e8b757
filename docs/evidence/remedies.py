#!/usr/bin/env python
"""Is the gain on redundant filters owed to RePr? The simple remedies at the start, beside RePr, on CIFAR-10.

docs/evidence/remedies.py --data DATA --cache FOLDER [--studies copies dead widened] [--seeds 0 1 2]

Trains what is missing in remedies.jsonl and, for rows that cifar10.py trains as well, in cifar10.jsonl of this
folder, one line a finished run; the same command goes on, on any machine. At the end come the tables of all lines.
What the rows are, and what was expected before the first run, is in remedies.md.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cifar10
import torch
from cifar import data, network, records, training
from telling import interval, markdown, paired, spread
from torch import nn

RUNS, SHARED = (Path(__file__).with_name(name) for name in ("remedies.jsonl", "cifar10.jsonl"))
OLD = 8  # filters of a conv that are no copies, not dead, or the narrow network's; the others are the last 24 of 32
SHARE = 0.75
SHORT = "--train-images 25000 --epochs 12 --s1 13 --s2 7"
GROWN = "--train-images 25000 --epochs 10 --max-drop-per-layer 0.75"
EARLY = "--s1 2.5 --s2 1.25"
FIRST, FRESH = range(5), range(5, 10)  # seeds of a question, and of what confirms its answer
SECOND = range(10, 18)  # of a second question of the widening, which is about two rows
TWO = ("new filters, readers at 0", "RePr, redundant")

Remedy = Callable[[nn.Sequential], None]
Record = dict[str, Any]


def with_noise(share: float) -> Remedy:
    """Adds noise to the weights of every copy: ``share`` of the standard deviation of its conv's weights."""

    def remedy(model: nn.Sequential) -> None:
        for conv in network.convs(model):
            copies = conv.weight[OLD:]
            copies += torch.randn_like(copies) * conv.weight.std() * share

    return remedy


def new(silent: bool = True, copies: bool = True) -> Remedy:
    """Puts a new random filter in the place of each redundant one.

    Args:
        silent: the weights of the old filters, and of the classifier, that read new ones become 0.
        copies: what is replaced were copies, so the weights that read an old filter were divided among them.
    """

    def remedy(model: nn.Sequential) -> None:
        fresh = network.build()
        for (conv, reader), source in zip(pairwise(_layers(model)), network.convs(fresh), strict=True):
            conv.weight[OLD:] = source.weight[OLD:]
            conv.bias[OLD:] = source.bias[OLD:]
            taps = reader.weight.view(len(reader.weight), len(conv.weight), -1)
            if copies:
                taps[:, :OLD] *= len(conv.weight) // OLD
            if silent:
                taps[:, OLD:] = 0

    return remedy


def embed(narrow: nn.Sequential, model: nn.Sequential) -> None:
    """Makes the first filters of every conv those of the narrow network."""
    layers, sources = _layers(model), _layers(narrow)
    for index, (layer, source) in enumerate(zip(layers, sources, strict=True)):
        if index == 0:
            layer.weight[:OLD] = source.weight
        else:
            rows = len(source.weight)
            taps = layer.weight.view(len(layer.weight), layers[index - 1].out_channels, -1)
            taps[:rows, :OLD] = source.weight.reshape(rows, OLD, -1)
        layer.bias[: len(source.bias)] = source.bias


def _layers(model: nn.Sequential) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in model if isinstance(module, (nn.Conv2d, nn.Linear))]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        options: of cifar10.py.
        remedy: what is done to the network at the start; None: cifar10.py trains the same, unless grown.
        network: that is trained.
        grown: the narrow network, widened by copies, is what training begins with.
    """

    options: str
    remedy: Remedy | None = None
    network: str = "3x3"
    grown: bool = False


COPIES, DEAD = f"{SHORT} --duplicates {SHARE}", f"{SHORT} --dead {SHARE}"
NARROW = Row(f"{GROWN} --rows standard", network=network.NARROW)
STUDIES: dict[str, dict[str, Row]] = {
    "copies": {
        "copies alone": Row(f"{COPIES} --rows standard"),
        "copies, 1 % noise": Row(f"{COPIES} --rows standard", with_noise(0.01)),
        "copies, 10 % noise": Row(f"{COPIES} --rows standard", with_noise(0.1)),
        "new filters, readers at 0": Row(f"{COPIES} --rows standard", new()),
        "RePr, ortho": Row(f"{COPIES} --rows ortho"),
        "RePr, redundant": Row(f"{COPIES} --rows redundant"),
        "RePr, redundant, early short cycles": Row(f"{COPIES} {EARLY} --rows redundant"),
        "nothing planted": Row(f"{SHORT} --rows standard"),
    },
    "dead": {
        "dead alone": Row(f"{DEAD} --rows standard"),
        "new filters, readers at 0": Row(f"{DEAD} --rows standard", new(copies=False)),
        "new filters, readers as they are": Row(f"{DEAD} --rows standard", new(silent=False, copies=False)),
        "RePr, ortho": Row(f"{DEAD} --rows ortho"),
        "RePr, apoz": Row(f"{DEAD} --rows apoz"),
        "RePr, redundant": Row(f"{DEAD} --rows redundant"),
        "RePr, redundant, early short cycles": Row(f"{DEAD} {EARLY} --rows redundant"),
        "RePr, apoz, early short cycles": Row(f"{DEAD} {EARLY} --rows apoz"),
        "nothing planted": Row(f"{SHORT} --rows standard"),
    },
    "widened": {
        "copies alone": Row(f"{GROWN} --rows standard", grown=True),
        "copies, 1 % noise": Row(f"{GROWN} --rows standard", with_noise(0.01), grown=True),
        "copies, 10 % noise": Row(f"{GROWN} --rows standard", with_noise(0.1), grown=True),
        "new filters, readers at 0": Row(f"{GROWN} --rows standard", new(), grown=True),
        "RePr, redundant": Row(f"{GROWN} {EARLY} --rows redundant", grown=True),
        "RePr, ortho": Row(f"{GROWN} --s1 1.25 --s2 1.25 --drop-ratio 0.5 --rows ortho", grown=True),
        "never widened, as long": Row(f"{GROWN} --epochs 20 --rows standard", network=network.NARROW),
        "wide from the start, as long": Row(f"{GROWN} --epochs 20 --rows standard"),
    },
}


class Study:
    """The finished runs of both files, and how to train a missing one."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        lines = RUNS.read_text().splitlines() if RUNS.exists() else []
        self.own = {(r["study"], r["name"], r["settings"]["seed"]): r for r in map(json.loads, lines)}
        self.shared = {settings.key: record for settings, record in records.read(SHARED)}
        self._narrow: dict[int, nn.Sequential] = {}

    def settings(self, row: Row, seed: int) -> records.Settings:
        args = cifar10.parse([*row.options.split(), "--seeds", str(seed)])
        return replace(cifar10.plan(args, self.digest)[0], network=row.network)

    def record(self, study: str, name: str, seed: int) -> Record | None:
        row = STUDIES[study][name]
        if row.remedy or row.grown or row.network == network.NARROW:
            return self.own.get((study, name, seed))
        return self.shared.get(self.settings(row, seed).key)

    def train(self, study: str, name: str, seed: int, feed: training.Feed) -> Record:
        """Trains the row and files its line."""
        row = STUDIES[study][name]
        settings = self.settings(row, seed)
        if row.grown and seed not in self._narrow:
            self._narrow[seed], _ = training.train(self.settings(NARROW, seed), feed)
        start = self.start(row, settings) if row.remedy or row.grown else None
        _, record = training.train(settings, feed, start=start)
        if start is None and row.network != network.NARROW:
            records.append(SHARED, record)
            self.shared[settings.key] = record
        else:
            records.append(RUNS, {"study": study, "name": name, **record})
            self.own[study, name, seed] = record
        return record

    @torch.no_grad()
    def start(self, row: Row, settings: records.Settings) -> nn.Sequential:
        """The network that training begins with."""
        torch.manual_seed(settings.seed)
        model = network.build()
        if row.grown:
            embed(self._narrow[settings.seed], model)
        network.plant(model, SHARE if row.grown else settings.duplicates, settings.dead)
        if row.remedy is not None:
            row.remedy(model)
        return model


def mean_of_last_five(record: Record) -> float:
    return statistics.mean(record["curve"][-5:])


def last_epoch(record: Record) -> float:
    return record["final"]


def finished(
    study: Study, name: str, row: str, value: Callable[[Record], float], seeds: Iterable[int]
) -> dict[int, float]:
    """Seed -> value of the runs of a row that are there."""
    found = {seed: study.record(name, row, seed) for seed in seeds}
    return {seed: value(record) for seed, record in found.items() if record}


def table(study: Study, name: str, seeds: Iterable[int] = FIRST) -> str:
    """Test accuracy in percent: last epoch, mean of the last five, and differences of that mean paired by seed."""
    alone = next(iter(STUDIES[name]))
    baseline = finished(study, name, alone, mean_of_last_five, seeds)
    lines = []
    for row in STUDIES[name]:
        values = finished(study, name, row, mean_of_last_five, seeds)
        if values:
            ends = finished(study, name, row, last_epoch, seeds)
            tests = [spread(ends.values()), spread(values.values())]
            difference = interval(paired(baseline, values)) if row != alone else ""
            lines.append([row, str(len(values)), *tests, difference])
        else:
            lines.append([row, "0", "not yet run", "", ""])
    head = ["at the start", "seeds", "last epoch", "mean of the last five", f"row - {alone} (95 % CI)"]
    return markdown(head, lines)


def verdicts(
    study: Study, names: Iterable[str] = STUDIES, seeds: Iterable[int] = FIRST, only: Iterable[str] = ()
) -> str:
    """Every form of RePr against every remedy, paired by seed; of the rows ``only`` if there are some."""
    lines = []
    for name in names:
        rows = {row: STUDIES[name][row] for row in only or STUDIES[name]}
        forms = [row for row in rows if row.startswith("RePr")]
        remedies = [row for row in rows if rows[row].remedy]
        for form, remedy in itertools.product(forms, remedies):
            pairs = [
                paired(*(finished(study, name, row, value, seeds) for row in (remedy, form)))
                for value in (mean_of_last_five, last_epoch)
            ]
            lines.append([name, form, remedy, *(interval(pair) if pair else "not yet run" for pair in pairs)])
    head = ["study", "form", "remedy", "form - remedy, mean of the last five (95 % CI)", "last epoch (95 % CI)"]
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder or zip file with the images; without it nothing is trained")
    parser.add_argument("--cache", type=Path, default=Path("output/cifar10/data"), help="for the decoded images")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these, as the tables name them")
    args = parser.parse_args()
    if args.data is not None:
        training.prepare_process()
        images = data.load(args.data, args.cache)
        feed = training.Feed(data.balanced(images.train, 25_000), images.test)
        study = Study(images.digest)
        for name, seed in itertools.product(args.studies, args.seeds):
            for row in args.rows or STUDIES[name]:
                if study.record(name, row, seed) is None:
                    record = study.train(name, row, seed, feed)
                    print(f"{name}, {row}, seed {seed}: {record['final']:.1f}, {record['seconds']:.0f} s", flush=True)
    study = Study(records.read(SHARED)[0][0].data)
    for name in STUDIES:
        print(name, table(study, name), sep="\n\n", end="\n\n")
    print(verdicts(study))
    print(f"widened, seeds {FRESH[0]} to {FRESH[-1]}", table(study, "widened", FRESH), sep="\n\n", end="\n\n")
    print(verdicts(study, ["widened"], FRESH), verdicts(study, ["widened"], SECOND, TWO), sep="\n\n")


if __name__ == "__main__":
    main()
