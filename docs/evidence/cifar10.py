#!/usr/bin/env python
"""The paper's table on the paper's data: C3(32) on CIFAR-10, trained plainly and with RePr by every criterion.

docs/evidence/cifar10.py --data FOLDER [--rows standard random weight_norm ortho] [--seeds 0 1 2]

--data is a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, a zip of it, or what torchvision downloads. Every
finished run is a line of runs.jsonl in --output, so the same command again trains only what is missing there.

--setting paper: 100 epochs, S1 20, S2 10, N 3, 30 % dropped. What the paper leaves open is chosen: 3x3 filters,
momentum 0.9, learning rate 0.01, batches of 64, no augmentation. --setting released: the author's code as it stands:
5x5 filters, 3x3 pooling, plain SGD of 0.05 halved every 25,000 steps, 50 % dropped, nine cycles of 20 + 20 epochs and
19 more, 379 in all. --epochs scales the whole schedule.

Every other option goes for the standard network and RePr alike, so the paper's ablations are: --optimizer, --dropout,
--distill, --ortho-reg, --drop-ratio, --max-drop-per-layer, --skip-first. --duplicates and --dead plant redundant
filters, as a control. --warm-images trains on a part of the images first.
"""

import argparse
import sys
from pathlib import Path

import torch
from cifar import data, network, records, training
from cifar.records import REPR_FIELDS, STANDARD, Settings
from tqdm import tqdm

from repr_det import UserError

ROWS = [STANDARD, "random", "mean_activation", "apoz", "gradient", "taylor", "hessian", "weight_norm", "ortho"]
# What an option is unless the user says otherwise. Phases are in percent of the training.
DEFAULTS = {
    "paper": {
        "rows": ROWS, "network": "3x3", "epochs": 100, "optimizer": "momentum", "lr_half_life": 0.0,
        "s1": 20.0, "s2": 10.0, "cycles": 3, "drop_ratio": 0.3, "max_drop_per_layer": 0.5, "scale": "kept",
    },
    "released": {
        "rows": [STANDARD, "ortho_released"], "network": "5x5", "epochs": 379, "optimizer": "sgd",
        "lr_half_life": 100 * 25_000 / (379 * 703),  # its 45,000 images are 703 batches
        "s1": 2000 / 379, "s2": 2000 / 379, "cycles": 9, "drop_ratio": 0.5, "max_drop_per_layer": 1.0, "scale": "unit",
    },
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [*ROWS, "ortho_released", "redundant"]
    rates = ", ".join(f"{name} {rate}" for name, (_, _, rate) in training.OPTIMIZERS.items())

    study = parser.add_argument_group("the study").add_argument
    study("--data", type=Path, help="folder or zip file with the images")
    study("--output", type=Path, default=Path("output/cifar10"), help="runs.jsonl, weights, decoded images")
    study("--rows", nargs="+", choices=rows, metavar="ROW", help=f"of {', '.join(rows)}")
    study("--seeds", type=int, nargs="+", default=[0, 1, 2])
    study("--device", default="cpu")

    both = parser.add_argument_group("every run").add_argument
    both("--setting", choices=DEFAULTS, default="paper", help="what the other options are by default")
    both("--network", choices=network.NETWORKS, help="size of the filters")
    both("--epochs", type=int)
    both("--train-images", type=int, default=50_000, help="equally many of each class")
    both("--batch-size", type=int, default=64)
    both("--optimizer", choices=training.OPTIMIZERS)
    both("--lr", type=float, help=f"the optimizer's: {rates}")
    both("--lr-half-life", type=float, metavar="PERCENT", help="of the training, to halve the learning rate; 0: never")
    both("--weight-decay", type=float, default=0.0)
    both("--dropout", type=float, default=0.0, metavar="P", help="before the classifier")
    both("--duplicates", type=float, default=0.0, metavar="SHARE", help="of every conv's filters begin as copies")
    both("--dead", type=float, default=0.0, metavar="SHARE", help="of every conv's filters begin with outputs of 0")
    both("--distill", type=float, default=0.0, metavar="WEIGHT", help="of the loss against a larger network's scores")
    both("--temperature", type=float, default=4.0, help="of the scores in that loss")
    both("--teacher-epochs", type=int, default=20, help="of the larger network, which is trained first")
    both("--ortho-reg", type=float, default=0.0, metavar="WEIGHT", help="of squared cosines of filters in the loss")
    both("--warm-images", type=int, default=0, metavar="N", help="begin with a standard network of so many images")
    both("--warm-epochs", type=int, metavar="EPOCHS", help="of that network (--epochs)")
    both("--bf16", action="store_true", help="conv and linear layers in bfloat16")

    repr_ = parser.add_argument_group("RePr").add_argument
    repr_("--s1", type=float, metavar="PERCENT", help="of the training: the full network in a cycle")
    repr_("--s2", type=float, metavar="PERCENT", help="of the training: the sub-network in a cycle")
    repr_("--cycles", type=int)
    repr_("--drop-ratio", type=float)
    repr_("--max-drop-per-layer", type=float)
    repr_("--skip-first", action="store_true", help="the first conv keeps all its filters")
    repr_("--scale", choices=["kept", "old", "unit"], help="norm of a new filter")
    repr_("--criterion-batches", type=int, default=40, help="that criteria with data look at")

    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.setting].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr is None:
        args.lr = training.OPTIMIZERS[args.optimizer][2]
    if args.warm_epochs is None:
        args.warm_epochs = args.epochs if args.warm_images else 0
    return args


def plan(args: argparse.Namespace, digest: str) -> list[Settings]:
    """The runs that the options ask for, all rows of a seed together."""
    own = {"row", "seed", "data", "distill", "temperature", "teacher", *REPR_FIELDS}
    common = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if name not in own}
    if args.distill:
        teacher = teacher_of(args, digest).key
        common |= {"distill": args.distill, "temperature": args.temperature, "teacher": teacher}
    for_repr = {name: getattr(args, name) for name in REPR_FIELDS}
    return [
        Settings(**common, row=row, seed=seed, data=digest, **({} if row == STANDARD else for_repr))
        for seed in args.seeds
        for row in args.rows
    ]


def teacher_of(args: argparse.Namespace, digest: str) -> Settings:
    """The run that trains the network to distil from."""
    return Settings(
        data=digest,
        network=network.TEACHER,
        train_images=args.train_images,
        epochs=args.teacher_epochs,
        lr=0.05,
        lr_half_life=12.5,
        weight_decay=5e-4,
        dropout=0.3,
        bf16=args.bf16,
    )


def weights_file(output: Path, settings: Settings) -> Path:
    return output / "weights" / f"{settings.key}.pt"


def load_weights(output: Path, settings: Settings) -> torch.nn.Module:
    model = network.build(settings.network)
    model.load_state_dict(torch.load(weights_file(output, settings), weights_only=True))
    return model


def run(settings: Settings, feed: training.Feed, output: Path, for_others: bool = False) -> None:
    """Trains, writes the weights and then a line of runs.jsonl, unless the line is there.

    Args:
        for_others: other runs need the weights: unless those are there too.
    """
    done = settings.key in {finished.key for finished, _ in records.read(output / "runs.jsonl")}
    weights = weights_file(output, settings)
    if done and (weights.exists() or not for_others):
        return
    start = None if settings.warm is None else load_weights(output, settings.warm)
    with tqdm(total=settings.epochs, unit="epoch", desc=f"{settings.row}, seed {settings.seed}") as bar:
        model, record = training.train(settings, feed, lambda epoch, accuracy: bar.update(), start)
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights)
    if not done:
        records.append(output / "runs.jsonl", record)


def study(args: argparse.Namespace) -> None:
    """Trains what is missing in runs.jsonl."""
    if args.data is None:
        raise UserError("--data is missing: a folder or zip file with the images of CIFAR-10")
    images = data.load(args.data, args.output / "data")
    feed, fewer = (
        training.Feed(data.balanced(images.train, number or args.train_images), images.test, args.device)
        for number in (args.train_images, args.warm_images)
    )
    if args.distill:
        teacher = teacher_of(args, images.digest)
        run(teacher, feed, args.output, for_others=True)
        feed.teacher = training.logits_of(load_weights(args.output, teacher).to(args.device), feed, feed.train)
    for settings in plan(args, images.digest):
        if settings.warm is not None:
            run(settings.warm, fewer, args.output, for_others=True)
        run(settings, feed, args.output)


def main() -> None:
    args = parse()
    training.prepare_process()
    study(args)
    for settings, record in records.read(args.output / "runs.jsonl"):
        print(f"{settings.row}, seed {settings.seed}: {record['final']:.2f} % ({settings.key})")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"cifar10.py: error: {error}\n")
        sys.exit(2)
