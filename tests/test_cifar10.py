"""docs/evidence/cifar10.py on data of 40 training and 20 test images."""

import dataclasses
import sys

import cifar10
import numpy as np
import pytest
import torch
from cifar import data, network, records, training
from cifar.records import Settings
from PIL import Image
from torch import nn

from repr_det import UserError

NUMBERS = {"train": 40, "test": 20}
TINY = ["--train-images", "40", "--batch-size", "8", "--epochs", "10", "--criterion-batches", "2", "--seeds", "0"]


@pytest.fixture
def parts(monkeypatch) -> dict[str, data.Images]:
    """Noise, brighter from class to class."""
    monkeypatch.setattr(data, "NUMBERS", NUMBERS)
    draw = np.random.default_rng(0)
    parts = {}
    for part, number in NUMBERS.items():
        classes = np.repeat(np.arange(10), number // 10)
        pixels = draw.integers(0, 100, (number, 32, 32, 3)) + 15 * classes[:, None, None, None]
        parts[part] = data.Images(torch.tensor(pixels, dtype=torch.uint8), torch.tensor(classes))
    return parts


@pytest.fixture
def feed(parts) -> training.Feed:
    return training.Feed(parts["train"], parts["test"])


@pytest.fixture
def study(tmp_path, parts, monkeypatch):
    """``study(*options)`` -> the finished runs of the output folder."""
    monkeypatch.setattr(training, "prepare_process", lambda: None)  # it would outlive the test
    for part, images in parts.items():
        for index, label in enumerate(images.classes.tolist()):
            file = tmp_path / "images" / part / data.CLASSES[label] / f"{index:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels[index].numpy()).save(file)

    def run(*options):
        words = ["cifar10.py", "--data", str(tmp_path / "images"), "--output", str(tmp_path), *TINY, *options]
        monkeypatch.setattr(sys, "argv", words)
        cifar10.main()
        return records.read(tmp_path / "runs.jsonl")

    return run


def settings(**options) -> Settings:
    """RePr's options only where there is a row of RePr."""
    common = {"train_images": 40, "batch_size": 8, "epochs": 10}
    if options.get("row", "standard") != "standard":
        common |= {"s1": 20.0, "s2": 10.0, "cycles": 3, "drop_ratio": 0.3, "max_drop_per_layer": 0.5}
        common |= {"skip_first": False, "scale": "kept", "criterion_batches": 2}
    return Settings(**(common | options))


def test_released_setting_is_the_authors_schedule():
    args = cifar10.parse(["--setting", "released", "--train-images", "45000", "--rows", "ortho_released"])
    (run,) = cifar10.plan(args, "digest")[:1]
    schedule = training.schedule_of(run)
    steps = -(-45_000 // 64)  # the author leaves the last batch of an epoch out
    assert (schedule.s1_iters, schedule.s2_iters, schedule.num_cycles) == (20 * steps, 20 * steps, 9)
    assert run.epochs * steps - schedule.end_iter == 19 * steps
    assert run.lr_half_life / 100 * run.epochs * (steps - 1) == pytest.approx(25_000)
    assert (run.network, run.optimizer, run.lr, run.drop_ratio) == ("5x5", "sgd", 0.05, 0.5)


def filters(model: nn.Module) -> list[torch.Tensor]:
    """A row a filter, its bias last."""
    return [torch.cat([c.weight.detach().flatten(1), c.bias.detach()[:, None]], 1) for c in network.convs(model)]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"duplicates": 0.5}, {"dead": 0.5}])
def test_standard_and_repr_train_the_same_until_the_first_drop(feed, options):
    plain, standard = training.train(settings(**options), feed)
    new, record = training.train(settings(row="ortho", **options), feed)
    equal = [a == b for a, b in zip(standard["loss_curve"], record["loss_curve"], strict=True)]
    assert equal[:3] == [True, True, False]
    assert [event["epoch"] for event in record["events"]] == [2, 3, 5, 6, 8, 9]
    assert sum(map(len, record["events"][0]["dropped"].values())) == 28
    for index, (stays, parted) in enumerate(zip(filters(plain), filters(new), strict=True)):
        dropped = {row for event in record["events"] for row in event["dropped"].get(str(3 * index), ())}
        for row in range(16, 32):
            if "dead" in options:
                assert stays[row, -1] == -1e3 and (parted[row, -1] > -1) == (row in dropped)
            if "duplicates" in options:
                torch.testing.assert_close(stays[row], stays[row - 16], rtol=0, atol=1e-4)
                assert (parted[row] - parted[row - 16]).abs().max() > 1e-2 or not {row, row - 16} & dropped


def test_records_survive_a_kill_and_later_fields(tmp_path):
    file = tmp_path / "runs.jsonl"
    old = {"row": "standard", "seed": 4, "data": "abc"}  # of a version that knew nothing else
    records.append(file, {"settings": old, "final": 1.0})
    with open(file, "ab") as lines:
        lines.write(b'{"settings": {"row": "standard", "se')  # killed here
    records.append(file, {"settings": dataclasses.asdict(Settings(seed=5, data="abc")), "final": 2.0})
    assert [(s.seed, r["final"]) for s, r in records.read(file)] == [(4, 1.0), (5, 2.0)]
    assert Settings(**old).key == Settings(seed=4, data="abc").key != Settings(seed=5, data="abc").key
    records.append(file, {"settings": {"row": "standard", "colour": "red"}})
    with pytest.raises(UserError, match=r"jsonl, line 3 is no run of this program \(.*colour.*\): delete the line"):
        records.read(file)


def test_a_study_trains_what_is_missing_with_teacher_and_first_weights(study, tmp_path, capsys):
    options = "--distill 0.5 --teacher-epochs 1 --warm-images 20 --warm-epochs 2 --rows standard".split()
    study(*options)
    held = study(*options, "ortho")
    found = [(s.network, s.row, s.train_images, s.epochs, s.warm_images) for s, _ in held]
    assert found[:2] == [("teacher", "standard", 40, 1, 0), ("3x3", "standard", 20, 2, 0)]
    assert found[2:] == [("3x3", "standard", 40, 10, 20), ("3x3", "ortho", 40, 10, 20)]
    assert held[2][0].teacher == held[0][0].key and "ortho, seed 0: " in capsys.readouterr().out
    for finished, _ in held[:2]:  # the weights that others need are trained again, to the same
        file = cifar10.weights_file(tmp_path, finished)
        before = torch.load(file)
        file.unlink()
        assert study(*options)[-1] == held[-1]
        assert all(torch.equal(value, before[name]) for name, value in torch.load(file).items())
