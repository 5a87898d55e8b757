"""A small study of examples/cifar10.py (conftest makes it importable) for the tests of it."""

import sys

import cifar10
import numpy as np
import torch
from cifar import data, training
from cifar.records import Settings

NUMBERS = {"train": 40, "test": 20}
TINY = ["--train-images", "40", "--batch-size", "8", "--epochs", "10", "--criterion-batches", "2"]


def tiny_parts() -> dict[str, data.Images]:
    """Noise, brighter from class to class."""
    draw = np.random.default_rng(0)
    parts = {}
    for part, number in NUMBERS.items():
        classes = np.repeat(np.arange(10), number // 10)
        pixels = draw.integers(0, 100, (number, 32, 32, 3)) + 15 * classes[:, None, None, None]
        parts[part] = data.Images(torch.tensor(pixels, dtype=torch.uint8), torch.tensor(classes))
    return parts


def tiny_feed() -> training.Feed:
    parts = tiny_parts()
    return training.Feed(parts["train"], parts["test"])


def settings(**options) -> Settings:
    """RePr's options only where there is a row of RePr."""
    common = {"train_images": 40, "batch_size": 8, "epochs": 10}
    if options.get("row", "standard") != "standard":
        common |= {"s1": 20.0, "s2": 10.0, "cycles": 3, "drop_ratio": 0.3, "max_drop_per_layer": 0.5}
        common |= {"skip_first": False, "scale": "kept", "criterion_batches": 2}
    return Settings(**(common | options))


def run_main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(training, "prepare_process", lambda: None)  # it would outlive the test
    monkeypatch.setattr(sys, "argv", ["cifar10.py", *map(str, arguments)])
    cifar10.main()
