#!/usr/bin/env python
"""The paper's table on the paper's data: C3(32) on CIFAR-10, trained plainly and with RePr by every criterion.

examples/cifar10.py --data FOLDER [--rows standard random weight_norm ortho] [--seeds 0 1 2] [--jobs 2]

--data is a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, a zip of it, or torchvision's cifar-10-batches-py. Every
finished run is a line of runs.jsonl in --output, so the same command again trains only what is missing there. At the
end comes the table of all runs in that file: test accuracy after the last epoch, and paired differences by seed.

--setting paper: 100 epochs, S1 20, S2 10, N 3, 30 % dropped. What the paper leaves open is chosen: 3x3 filters,
momentum 0.9, learning rate 0.01, batches of 64, no augmentation. --setting released: the author's code as it stands:
5x5 filters, 3x3 pooling, plain SGD of 0.05 halved every 25,000 steps, 50 % dropped, nine cycles of 20 + 20 epochs and
19 more, 379 in all. --epochs scales the whole schedule.

Every other option goes for the standard network and RePr alike, so the paper's ablations are: --optimizer, --dropout,
--distill, --ortho-reg, --drop-ratio, --max-drop-per-layer, --skip-first. --duplicates and --dead plant
redundant filters, as a control. --warm-images trains on a part of the images first. --influence draws what each filter
is worth.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cifar import data, figure, network, records, report, training
from cifar.records import ORACLE, REPR_FIELDS, STANDARD, Settings
from tqdm import tqdm

from repr_det import UserError
from repr_det.method.criteria import CRITERIA

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
# option -> (least, most)
RANGES = {
    "jobs": (1, 1024), "epochs": (1, 100_000), "train_images": (10, data.NUMBERS["train"]), "batch_size": (1, 50_000),
    "lr_half_life": (0, 100), "weight_decay": (0, 1), "dropout": (0, 0.99), "duplicates": (0, 0.95), "dead": (0, 0.95),
    "distill": (0, 1), "temperature": (0.1, 100), "teacher_epochs": (1, 100_000), "ortho_reg": (0, 1000),
    "warm_images": (0, data.NUMBERS["train"]), "warm_epochs": (0, 100_000),
    "s1": (0, 100), "s2": (0, 100), "criterion_batches": (1, 100_000),
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [STANDARD, *CRITERIA, ORACLE]
    rates = ", ".join(f"{name} {rate}" for name, (_, _, rate) in training.OPTIMIZERS.items())

    study = parser.add_argument_group("the study").add_argument
    study("--data", type=Path, help="folder or zip file with the images")
    study("--output", type=Path, default=Path("output/cifar10"), help="runs.jsonl, weights, decoded images, figure")
    study("--rows", nargs="+", choices=rows, metavar="ROW", help=f"of {', '.join(rows)}")
    study("--seeds", type=int, nargs="+", default=[0, 1, 2])
    study("--jobs", type=int, default=1, help="processes, each of one thread, that share the runs (1)")
    study("--device", default="cpu")
    study("--influence", action="store_true", help="draw the test accuracy that each filter is worth, in influence.svg")
    study("--only-report", action="store_true", help="train nothing")

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
    both(
        "--duplicates",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of every conv's filters begin as copies of others",
    )
    both("--dead", type=float, default=0.0, metavar="SHARE", help="of every conv's filters begin with outputs of 0")
    both("--distill", type=float, default=0.0, metavar="WEIGHT", help="of the loss against a larger network's scores")
    both("--temperature", type=float, default=4.0, help="of the scores in that loss")
    both("--teacher-epochs", type=int, default=20, help="of the larger network, which is trained first")
    both(
        "--ortho-reg", type=float, default=0.0, metavar="WEIGHT", help="of squared cosines between filters in the loss"
    )
    both("--warm-images", type=int, default=0, metavar="N", help="go on from a standard network of so many images")
    both("--warm-epochs", type=int, metavar="EPOCHS", help="of that network (--epochs)")
    both("--bf16", action="store_true", help="conv and linear layers in bfloat16")

    repr_ = parser.add_argument_group("RePr").add_argument
    repr_("--s1", type=float, metavar="PERCENT", help="of the training: the full network in a cycle")
    repr_("--s2", type=float, metavar="PERCENT", help="of the training: the sub-network in a cycle")
    repr_("--cycles", type=int)
    repr_("--drop-ratio", type=float)
    repr_("--max-drop-per-layer", type=float)
    repr_("--skip-first", action="store_true", help="the first conv takes no part")
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


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what argparse cannot see."""
    for name, (least, most) in RANGES.items():
        if not least <= getattr(args, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} must be {least} to {most}, got {getattr(args, name)}")
    if args.warm_images > args.train_images:
        raise UserError(f"--warm-images {args.warm_images} are more than --train-images {args.train_images}")
    if bool(args.warm_images) != bool(args.warm_epochs):
        raise UserError("--warm-images and --warm-epochs go together: one of them is 0")
    if not args.lr > 0:
        raise UserError(f"--lr must be above 0, got {args.lr}")
    if args.data is None:
        raise UserError("--data is missing: a folder or zip file with the images of CIFAR-10")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    if args.jobs > 1 and args.device != "cpu":
        raise UserError(f"--jobs {args.jobs} is for the CPU: take --jobs 1 with --device {args.device}")
    for seed in args.seeds:
        if not 0 <= seed < 2**63:
            raise UserError(f"--seeds must be at least 0 and below 2^63, got {seed}")


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


def run(
    settings: Settings,
    feed: training.Feed,
    output: Path,
    on_epoch: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> None:
    """Trains and files the result, unless that is done or another process is at it."""
    with records.claimed(output / "claims", settings.key) as mine:
        if mine and not _is_done(settings, output):
            start = None if settings.warm is None else load_weights(output, settings.warm)
            records.append(output / "runs.jsonl", _train(settings, feed, output, on_epoch, start))


def run_first(settings: Settings, feed: training.Feed, output: Path, what: str) -> torch.nn.Module:
    """The network of a run that others need. It is trained, with a bar of its own, unless its weights and its record
    are there; where another process is at it, that one is waited for."""
    with (
        records.claimed(output / "claims", settings.key, wait=True),
        tqdm(total=settings.epochs, unit="epoch", desc=what) as bar,
    ):
        done = _is_done(settings, output)
        if not done or not weights_file(output, settings).exists():
            record = _train(settings, feed, output, lambda epoch, accuracy: bar.update())
            if not done:
                records.append(output / "runs.jsonl", record)
    return load_weights(output, settings)


def _is_done(settings: Settings, output: Path) -> bool:
    return settings.key in {done.key for done, _ in records.read(output / "runs.jsonl")}


def _train(
    settings: Settings,
    feed: training.Feed,
    output: Path,
    on_epoch: Callable[[int, float], None],
    start: torch.nn.Module | None = None,
) -> dict[str, Any]:
    """Trains, writes the weights, whole or not at all, and returns the record."""
    model, record = training.train(settings, feed, on_epoch, start)
    weights = weights_file(output, settings)
    weights.parent.mkdir(exist_ok=True)
    temporary = weights.with_suffix(".tmp")
    torch.save(model.state_dict(), temporary)
    temporary.replace(weights)
    return record


def load_weights(output: Path, settings: Settings) -> torch.nn.Module:
    """The finished network. Raises FileNotFoundError where its weights are gone."""
    model = network.build(settings.network)
    model.load_state_dict(torch.load(weights_file(output, settings), weights_only=True))
    return model


def _work(runs: list[Settings], feed: training.Feed, output: Path, epochs: "multiprocessing.Value") -> None:
    """What each of several processes does: the runs that no other one has taken."""
    training.prepare_process(dies_with_parent=True)

    def on_epoch(epoch: int, accuracy: float) -> None:
        with epochs.get_lock():
            epochs.value += 1

    for settings in runs:
        run(settings, feed, output, on_epoch)


def train_all(runs: list[Settings], feed: training.Feed, args: argparse.Namespace) -> None:
    """Trains the runs in --jobs processes, with a progress bar in epochs."""
    with tqdm(total=len(runs) * args.epochs, unit="epoch", disable=not runs) as bar:
        if args.jobs == 1:
            for settings in runs:
                name = f"{settings.row}, seed {settings.seed}"

                def on_epoch(epoch: int, accuracy: float, name: str = name) -> None:
                    bar.set_postfix_str(f"{name}: {accuracy:.2f} %", refresh=False)
                    bar.update()

                run(settings, feed, args.output, on_epoch)
            return
        spawned = torch.multiprocessing.get_context("spawn")  # torch's, so that the processes share the images
        epochs = spawned.Value("q", 0)
        processes = [spawned.Process(target=_work, args=(runs, feed, args.output, epochs)) for _ in range(args.jobs)]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(0.2)
            if epochs.value > bar.n:
                bar.update(epochs.value - bar.n)
    if any(process.exitcode for process in processes):
        raise UserError("a process stopped early, see above: the same command goes on with the runs that are missing")


def study(args: argparse.Namespace) -> None:
    """Checks everything, then trains what is missing in runs.jsonl."""
    check(args)
    images = data.load(args.data, args.output / "data")
    feed = training.Feed(data.balanced(images.train, args.train_images), images.test, args.device)
    runs = plan(args, images.digest)
    for settings in runs[: len(args.rows)]:
        model = network.build(settings.network)
        training.schedule_of(settings)
        training.scheme_of(settings, model, training.optimizer_of(settings, model), feed)
    finished = {done.key for done, _ in records.read(args.output / "runs.jsonl")}
    missing = [settings for settings in runs if settings.key not in finished]
    if missing and args.distill:
        model = run_first(teacher_of(args, images.digest), feed, args.output, "teacher")
        feed.teacher = training.logits_of(model.to(args.device), feed, feed.train)
    if missing and args.warm_images:
        fewer = training.Feed(data.balanced(images.train, args.warm_images), images.test, args.device)
        for warm in dict.fromkeys(settings.warm for settings in missing):
            run_first(warm, fewer, args.output, f"first, seed {warm.seed}")
    train_all(missing, feed, args)
    if args.influence:
        measure_influence(runs, feed, args.output)


def measure_influence(runs: list[Settings], feed: training.Feed, output: Path) -> None:
    """Files what each filter of the finished runs is worth, one line a run."""
    known = {key for key, _ in records.read_influence(output)}
    missing = [r for r in runs if r.key not in known and weights_file(output, r).exists()]
    for settings in tqdm(missing, unit="run", desc="influence"):
        found = training.influence(load_weights(output, settings).to(feed.device), feed)
        records.append(output / "influence.jsonl", {"key": settings.key, "influence": found})


def main() -> None:
    args = parse()
    training.prepare_process()
    if not args.only_report:
        study(args)
    runs = records.read(args.output / "runs.jsonl")
    print(report.table(runs))
    if args.influence:
        print(figure.draw_influence(runs, records.read_influence(args.output), args.output / "influence.svg"))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"cifar10.py: error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("cifar10.py: stopped; finished runs are kept, and the same command goes on\n")
        sys.exit(130)
