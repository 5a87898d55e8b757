#!/usr/bin/env python
"""The paper's C3(32) classifier on scikit-learn's digits, with and without RePr, without Detectron2.

docs/evidence/digits.py [--seeds 0 1 2 3 4] [--scheme criterion=ortho drop_ratio=0.3 ...] [--oracle]

Trains the same network twice per seed, from the same weights on the same batches for the same number of steps: plainly,
and with RePr on the paper's schedule (S1 = 20, S2 = 10, N = 3 of 100 epochs, scaled to --epochs). --scheme takes any
option of RePr that is a name or a number, --norm puts a norm behind every conv. With --oracle it also ranks the filters
of the plainly trained networks by every criterion and by the oracle, which tries each filter on held-out images.
"""

import argparse
import ast
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from repr_det import RePr, RePrSchedule, UserError, find_filter_layers
from repr_det.method.criteria import CRITERIA, Context, get_criterion
from repr_det.method.passes import TrainingPasses

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from criteria import ablation
from saliency import SALIENCY

BATCH_SIZE = 50
HELD_OUT = 400
NORMS = {"none": nn.Identity, "BN": lambda: nn.BatchNorm2d(32), "GN": lambda: nn.GroupNorm(8, 32)}
CHOICES = CRITERIA | SALIENCY
Data = tuple[Tensor, Tensor]


def c3_32(norm: str = "none") -> nn.Sequential:
    """Three conv layers of 32 filters each and a linear classifier: the paper's vanilla network, with "none"."""

    def conv(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 32, 3, padding=1), NORMS[norm](), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    return nn.Sequential(*conv(1), *conv(32), pool, *conv(32), pool, nn.Flatten(), nn.Linear(128, 10))


def digits(num_train: int) -> tuple[Data, Data, Data]:
    """Images (N, 1, 8, 8) in [0, 1] and classes (N,): training, held-out (for the oracle) and test; always the same."""
    raw = load_digits()
    images, classes = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16, torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.split([num_train, HELD_OUT, len(images) - num_train - HELD_OUT])
    return tuple((images[part], classes[part]) for part in parts)


def batches_of(data: Data, order: Tensor) -> list[Data]:
    return [(data[0][rows], data[1][rows]) for rows in order.split(BATCH_SIZE)]


def option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def passes_over(model: nn.Module, data: Data) -> TrainingPasses:
    """How data-driven criteria look at ``data``: up to ``number`` batches of it, others in every cycle."""

    def batches(number: int, cycle: int) -> list[Data]:
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(cycle))
        return batches_of(data, order)[:number]

    return TrainingPasses(model, batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))


def train(data: Data, seed: int, use_repr: bool, args: argparse.Namespace) -> nn.Module:
    """One run; both arms draw the same weights and the same batches from ``seed``."""
    torch.manual_seed(seed)
    model = c3_32(args.norm)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    steps = args.epochs * -(-len(data[0]) // BATCH_SIZE)
    repr_training = None
    if use_repr:
        schedule = RePrSchedule(s1_iters=steps * args.s1 // 100, s2_iters=steps * args.s2 // 100, num_cycles=3)
        options = {"schedule": schedule, "passes": passes_over(model, data), "seed": seed, **dict(args.scheme)}
        criterion = options.get("criterion", "ortho")
        options["criterion"] = CHOICES.get(criterion, criterion)
        repr_training = RePr(model, optimizer, steps, **options)
    for _ in range(args.epochs):
        for images, classes in batches_of(data, torch.randperm(len(data[0]))):
            loss = F.cross_entropy(model(images), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if repr_training is not None:
                repr_training.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Percent, of the model as it is used after training (running statistics of BN)."""
    model.eval()
    found = 100 * (model(data[0]).argmax(1) == data[1]).float().mean().item()
    model.train()
    return found


def correlations(model: nn.Module, held_out: Data, seed: int) -> dict[str, float]:
    """Spearman's rank correlation of every criterion with the oracle over all filters (the paper's figure 4)."""
    passes = passes_over(model, held_out)
    layers = find_filter_layers(model, ["*"])
    context = Context(torch.Generator().manual_seed(seed), passes, num_batches=8)
    harm = torch.cat([ablation(layer, passes, list(passes.batches(8, 0))) for layer in layers])
    found = {}
    for name, criterion in sorted(CHOICES.items()):
        scores = torch.cat([score.double() for score in get_criterion(criterion).score(layers, context).values()])
        # Without a rank where all scores are the same: "redundant", and nothing is.
        found[name] = 0.0 if scores.unique().numel() == 1 else float(spearmanr(scores, -harm).statistic)
    return found


def spread(values: list[float], sign: str = "") -> str:
    """Mean +- standard deviation."""
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--train-images", type=int, default=500)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--norm", default="none", choices=NORMS)
    parser.add_argument("--s1", type=int, default=20, help="of the full network in a cycle, %% of the training (20)")
    parser.add_argument("--s2", type=int, default=10, help="of the sub-network in a cycle, %% of the training (10)")
    parser.add_argument("--scheme", type=option, nargs="+", default=[], metavar="KEY=VALUE", help="options of RePr")
    parser.add_argument("--oracle", action="store_true", help="print the rank correlation of criteria with the oracle")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    training, held_out, test = digits(args.train_images)
    scores: dict[str, list[float]] = {"baseline": [], "RePr": []}
    ranks: list[dict[str, float]] = []
    for seed in args.seeds:
        for arm, found in scores.items():
            model = train(training, seed, arm == "RePr", args)
            found.append(accuracy(model, test))
            if args.oracle and arm == "baseline":
                ranks.append(correlations(model, held_out, seed))
        print(f"seed {seed}: test accuracy", ", ".join(f"{arm} {found[-1]:.2f}" for arm, found in scores.items()))
    for arm, found in scores.items():
        print(f"{arm:20}{spread(found):>18}")
    print(f"{'RePr - baseline':20}{spread([b - a for a, b in zip(*scores.values(), strict=True)], '+'):>18}")
    for name in ranks[0] if ranks else ():
        print(f"{name:20}{spread([found[name] for found in ranks], '+'):>18}  rank correlation with the oracle")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"digits.py: error: {error}")
