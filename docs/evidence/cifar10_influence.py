#!/usr/bin/env python
"""The paper's figure of filters' influence: how much test accuracy the loss of one filter costs, for every filter.

docs/evidence/cifar10_influence.py [--data DATA] [--output output/cifar10]

With --data it measures the runs of --output whose weights are there and adds a line for each to cifar10_influence.jsonl
of this folder. It draws all lines, filters from the most to the least needed; a line is the mean over the seeds, its
shade their range.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import cifar10
import numpy as np
import torch
from cifar import data, records, training
from cifar.records import STANDARD
from torch import nn

HERE = Path(__file__).parent
LINES, RUNS = HERE / "cifar10_influence.jsonl", HERE / "cifar10.jsonl"
FIGURE = HERE.parent / "pictures" / "influence.svg"


@torch.no_grad()
def influence(model: nn.Sequential, feed: training.Feed) -> dict[str, list[float]]:
    """Measures the test accuracy of the network less that without each filter, in percentage points.

    Args:
        model: without norms: a filter that is removed is a channel that is zero after the ReLU.

    Returns:
        conv name -> one number a filter.
    """
    was_training = model.training
    model.eval()
    names = [name for name, module in model.named_children() if isinstance(module, nn.Conv2d)]
    correct = {name: torch.zeros(model.get_submodule(name).out_channels + 1, dtype=torch.long) for name in names}
    for first in range(0, len(feed.test), training.EVAL_BATCH):
        output, classes = feed.batch(feed.test, slice(first, first + training.EVAL_BATCH))
        for start in map(int, names):
            # Conv, pooling, ReLU, and what comes after them.
            output, rest = model[start : start + 3](output), model[start + 3 :]
            for index in range(output.shape[1] + 1):  # the last time without removing any
                removed = output.clone()
                removed[:, index : index + 1] = 0
                correct[str(start)][index] += (rest(removed).argmax(1) == classes).sum().cpu()
    model.train(was_training)
    return {name: (100 * (hits[-1] - hits[:-1]).double() / len(feed.test)).tolist() for name, hits in correct.items()}


def measure(source: Path, output: Path) -> None:
    images = data.load(source, output / "data")
    feed = training.Feed(images.train, images.test)
    known = {json.loads(line)["key"] for line in LINES.read_text().splitlines()}
    for settings, _ in records.read(output / "runs.jsonl"):
        if settings.key not in known and cifar10.weights_file(output, settings).exists():
            found = influence(cifar10.load_weights(output, settings), feed)
            records.append(LINES, {"key": settings.key, "influence": found})


def draw(lines: Path, runs: Path, file: Path) -> None:
    from matplotlib.figure import Figure

    rows = {settings.key: settings.row for settings, _ in records.read(runs)}
    worth = defaultdict(list)  # row -> networks (3 convs, filters)
    for line in map(json.loads, lines.read_text().splitlines()):
        worth[rows[line["key"]]].append([sorted(conv, reverse=True) for conv in line["influence"].values()])
    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for row, networks in worth.items():
        style = {"color": "black", "linestyle": "--"} if row == STANDARD else {}
        for panel, values in zip(panels, np.swapaxes(networks, 0, 1), strict=True):
            rank = np.arange(1, values.shape[1] + 1)
            (line,) = panel.plot(rank, values.mean(0), label=row, **style)
            panel.fill_between(rank, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
            panel.set_xlabel("filter, by influence")
    for number, panel in enumerate(panels, 1):
        panel.set_title(f"conv {number}", loc="left")
    panels[0].set_ylabel("test accuracy lost, points")
    panels[-1].legend(frameon=False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder or zip file with the images; without it nothing is measured")
    parser.add_argument("--output", type=Path, default=Path("output/cifar10"))
    args = parser.parse_args()
    if args.data:
        measure(args.data, args.output)
    draw(LINES, RUNS, FIGURE)


if __name__ == "__main__":
    main()
