#!/usr/bin/env python
"""RePr in a plain PyTorch loop, without Detectron2: the paper's C3(32) classifier on scikit-learn's digits.

examples/plain_pytorch.py [--seeds 0 1 2 3 4] [--scheme criterion=ortho drop_ratio=0.3 ...] [--oracle]

Trains the same network twice per seed, from the same weights on the same batches for the same number of steps: plainly,
and with RePr on the paper's schedule (S1 = 20, S2 = 10, N = 3 of 100 epochs, scaled to --epochs). --scheme takes any
option of RePr that is a name or a number, --norm puts a norm behind every conv. With --oracle it also
ranks the filters of the plainly trained networks by every criterion and by the oracle, which tries each filter on
held-out images, and prints their rank correlation.
"""

import argparse
import math
import statistics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from criteria import correlation_with_oracle
from torch import Tensor, nn

from repr_det import RePr, RePrSchedule, UserError, find_filter_layers
from repr_det.method.criteria import CRITERIA, Context, get_criterion
from repr_det.method.options import RePrOptions
from repr_det.method.passes import TrainingPasses

BATCH_SIZE = 50
HELD_OUT = 400
Data = tuple[Tensor, Tensor]
# Of RePr, and how they are read.
OPTIONS = {"criterion": str, "drop_ratio": float, "max_drop_per_layer": float, "scale": str, "returns": str}


NORMS = {"none": nn.Identity, "BN": lambda: nn.BatchNorm2d(32), "GN": lambda: nn.GroupNorm(8, 32)}


def c3_32(norm: str = "none") -> nn.Sequential:
    """Three conv layers of 32 filters each and a linear classifier: the paper's vanilla network, with "none"."""

    def conv(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 32, 3, padding=1), NORMS[norm](), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    return nn.Sequential(*conv(1), *conv(32), pool, *conv(32), pool, nn.Flatten(), nn.Linear(128, 10))


def digits(num_train: int) -> tuple[Data, Data, Data]:
    """Images (N, 1, 8, 8) in [0, 1] and classes (N,): training, held-out (for the oracle) and test; always the same."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    classes = torch.tensor(raw.target)
    most = len(images) - HELD_OUT - 100
    if not BATCH_SIZE <= num_train <= most:
        raise UserError(f"--train-images must be {BATCH_SIZE} to {most}, got {num_train}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.split([num_train, HELD_OUT, len(images) - num_train - HELD_OUT])
    return tuple((images[part], classes[part]) for part in parts)


def batches_of(data: Data, order: Tensor) -> list[Data]:
    return [(data[0][rows], data[1][rows]) for rows in order.split(BATCH_SIZE)]


def scheme_options(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE as arguments of RePr. Raises UserError for those that it would refuse."""
    options = {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in OPTIONS:
            raise UserError(f"--scheme takes KEY=VALUE with a KEY of {', '.join(OPTIONS)}, got {text!r}")
        try:
            options[key] = OPTIONS[key](value)
        except ValueError:
            raise UserError(f"--scheme {key} must be a number, got {value!r}") from None
    get_criterion(RePrOptions.of(options).criterion)
    return options


def passes_over(model: nn.Module, data: Data) -> TrainingPasses:
    """How data-driven criteria look at ``data``: up to ``number`` batches of it, others in every cycle."""

    def batches(number: int, cycle: int) -> list[Data]:
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(cycle))
        return batches_of(data, order)[:number]

    def join(many: list[Data]) -> Data:
        return torch.cat([x for x, _ in many]), torch.cat([y for _, y in many])

    return TrainingPasses(model, batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), join)


def train(data: Data, seed: int, epochs: int, use_repr: bool, args: argparse.Namespace) -> nn.Module:
    """One run; both arms draw the same weights and the same batches from ``seed``."""
    torch.manual_seed(seed)
    model = c3_32(args.norm)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    steps = epochs * -(-len(data[0]) // BATCH_SIZE)

    # What RePr adds to a training loop: one object, told after every step. Without `schedule` it derives its own.
    repr_training = None
    if use_repr:
        schedule = RePrSchedule(s1_iters=steps * args.s1 // 100, s2_iters=steps * args.s2 // 100, num_cycles=3)
        repr_training = RePr(
            model,
            optimizer,
            steps,
            schedule=schedule,
            seed=seed,
            passes=passes_over(model, data),
            **args.scheme,
        )

    for _ in range(epochs):
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
    parser.add_argument("--scheme", nargs="+", default=[], metavar="KEY=VALUE", help=f"one of {', '.join(OPTIONS)}")
    parser.add_argument("--oracle", action="store_true", help="print the rank correlation of criteria with the oracle")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.epochs < 1:
        raise UserError(f"--epochs must be at least 1, got {args.epochs}")
    args.scheme = scheme_options(args.scheme)

    training, held_out, test = digits(args.train_images)
    scores: dict[str, dict[str, list[float]]] = {arm: {"train": [], "test": []} for arm in ("baseline", "RePr")}
    correlations: dict[str, list[float]] = {name: [] for name in sorted(CRITERIA)}
    print(f"{len(training[0])} training, {len(held_out[0])} held-out and {len(test[0])} test images of 10 classes")
    for seed in args.seeds:
        start = time.perf_counter()
        for arm, found in scores.items():
            model = train(training, seed, args.epochs, arm == "RePr", args)
            found["train"].append(accuracy(model, training))
            found["test"].append(accuracy(model, test))
            if args.oracle and arm == "baseline":
                context = Context(torch.Generator().manual_seed(seed), passes_over(model, held_out), num_batches=8)
                layers = find_filter_layers(model, ["*"])
                for name, value in correlation_with_oracle(layers, context, list(correlations)).items():
                    # Without a rank where all scores are the same: "redundant", and nothing is.
                    correlations[name].append(0.0 if math.isnan(value) else value)
        both = ", ".join(f"{arm} {found['test'][-1]:.2f}" for arm, found in scores.items())
        print(f"seed {seed}: test accuracy {both} ({time.perf_counter() - start:.0f} s)", flush=True)

    print(f"\naccuracy in %, mean +- standard deviation over {len(args.seeds)} seed(s)")
    print(f"{'':16}{'train':>18}{'test':>18}")
    for arm, found in scores.items():
        print(f"{arm:16}{spread(found['train']):>18}{spread(found['test']):>18}")
    pairs = {
        k: [b - a for a, b in zip(scores["baseline"][k], scores["RePr"][k], strict=True)] for k in ("train", "test")
    }
    print(f"{'RePr - baseline':16}{spread(pairs['train'], '+'):>18}{spread(pairs['test'], '+'):>18}")
    if args.oracle:
        print("\nrank correlation with the oracle over the 96 filters, mean +- standard deviation")
        for name, values in sorted(correlations.items(), key=lambda item: -statistics.mean(item[1])):
            print(f"{name:20}{spread(values, '+'):>18}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"plain_pytorch.py: error: {error}\n")
        sys.exit(2)
