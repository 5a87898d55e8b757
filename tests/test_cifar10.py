"""docs/evidence/cifar10.py on data of 40 training and 20 test images."""

import copy
import dataclasses
import sys
import zipfile
from pathlib import Path

import cifar10
import cifar10_influence
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets
from cifar import data, network, records, training
from cifar.records import Settings
from PIL import Image
from scipy.spatial.distance import cdist
from scipy.special import log_softmax
from torch import Tensor, nn

from repr_det import UserError

NUMBERS = {"train": 40, "test": 20}
TINY = ["--train-images", "40", "--batch-size", "8", "--epochs", "10", "--criterion-batches", "2", "--seeds", "0"]
WARM = {"warm_images": 20, "warm_epochs": 2}
IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


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
def folder(tmp_path, parts) -> Path:
    root = tmp_path / "images"
    for part, images in parts.items():
        for index, label in enumerate(images.classes.tolist()):
            file = root / part / data.CLASSES[label] / f"{index:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels[index].numpy()).save(file)
    return root


@pytest.fixture
def feed(parts) -> training.Feed:
    return training.Feed(parts["train"], parts["test"])


@pytest.fixture
def study(tmp_path, folder, monkeypatch):
    """``study(*options)`` -> the finished runs of the output folder."""
    monkeypatch.setattr(training, "prepare_process", lambda: None)  # it would outlive the test

    def run(*options):
        words = ["cifar10.py", "--data", str(folder), "--output", str(tmp_path), *TINY, *options]
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


def test_folder_zip_and_torchvisions_files_are_the_same_images(folder, parts, tmp_path, monkeypatch):
    archive, other = tmp_path / "images.zip", tmp_path / "torchvision"
    with zipfile.ZipFile(archive, "w") as file:
        for image in sorted(folder.rglob("*.png")):
            file.write(image, image.relative_to(folder))
    (other / "cifar-10-batches-py").mkdir(parents=True)

    class CIFAR10:
        def __init__(self, root, train):
            images = parts["train" if train else "test"]
            self.data, self.targets = images.pixels.numpy(), images.classes.tolist()

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    found = [data.load(source, tmp_path / "cache") for source in (folder, archive, other)]
    assert all(torch.equal(held.train.pixels, parts["train"].pixels) for held in found)
    assert all(torch.equal(held.test.classes, parts["test"].classes) for held in found)
    assert len({held.digest for held in found}) == 1
    with monkeypatch.context() as patch:
        patch.setattr(data, "_reader", None)
        assert data.load(folder, tmp_path / "cache").digest == found[0].digest  # decoded once
    (folder / "test/cat/0006.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"^[^\n]*0006\.png cannot be read as an image of 32 x 32"):
        data.load(folder, tmp_path / "other")
    (folder / "train/frog/0024.png").unlink()
    with pytest.raises(UserError, match=r"/train/frog must hold 4 images, got 3: unpack"):
        data.load(folder, tmp_path / "other")


def test_a_subset_has_equally_many_of_each_class(parts):
    mixed = parts["train"].take(torch.randperm(40, generator=torch.Generator().manual_seed(1)))
    for number in (10, 25, 40):
        counts = torch.bincount(data.balanced(mixed, number).classes, minlength=10)
        assert counts.sum() == number and counts.max() - counts.min() <= 1
    assert torch.equal(data.balanced(mixed, 10).pixels[3], mixed.pixels[(mixed.classes == 3).nonzero()[0, 0]])


def test_released_setting_is_the_authors_schedule():
    args = cifar10.parse(["--setting", "released", "--train-images", "45000", "--rows", "ortho_released"])
    (run,) = cifar10.plan(args, "digest")[:1]
    schedule = training.schedule_of(run)
    steps = -(-45_000 // 64)  # the author leaves the last batch of an epoch out
    assert (schedule.s1_iters, schedule.s2_iters, schedule.num_cycles) == (20 * steps, 20 * steps, 9)
    assert run.epochs * steps - schedule.end_iter == 19 * steps
    assert run.lr_half_life / 100 * run.epochs * (steps - 1) == pytest.approx(25_000)
    assert (run.network, run.optimizer, run.lr, run.drop_ratio) == ("5x5", "sgd", 0.05, 0.5)


def test_networks_are_those_of_paper_and_released_code():
    sizes = [3 * 9 * 32 + 32, 32 * 9 * 32 + 32, 32 * 9 * 32 + 32, 32 * 4 * 4 * 10 + 10]
    assert sum(p.numel() for p in network.build("3x3").parameters()) == sum(sizes)
    rows = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    padded = np.pad(rows, (0, 1), constant_values=-np.inf)  # at the far edge only
    wanted = [[padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max() for j in range(16)] for i in range(16)]
    np.testing.assert_array_equal(network.build("5x5")[1](torch.tensor(rows)[None])[0], wanted)
    assert network.build(network.TEACHER)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def of_first_filters(model: nn.Sequential, keep: int) -> nn.Sequential:
    """The network of the first ``keep`` filters of every conv, by slicing."""
    narrow = copy.deepcopy(model)
    for index, conv in enumerate(network.convs(narrow)):
        conv.weight = nn.Parameter(conv.weight[:keep] if index == 0 else conv.weight[:keep, :keep])
        conv.bias = nn.Parameter(conv.bias[:keep])
    narrow[-1].weight = nn.Parameter(narrow[-1].weight[:, : keep * 4 * 4])
    return narrow


def filters(model: nn.Module) -> list[Tensor]:
    """A row a filter, its bias last."""
    return [torch.cat([c.weight.detach().flatten(1), c.bias.detach()[:, None]], 1) for c in network.convs(model)]


@pytest.mark.parametrize(
    ("planted", "share", "keep"), [("duplicates", 0.75, 8), ("duplicates", 0.3, 23), ("dead", 0.25, 24)]
)
@pytest.mark.parametrize("kind", network.NETWORKS)
def test_planted_filters_change_nothing_and_descent_does_not_part_them(kind, planted, share, keep):
    torch.manual_seed(0)
    model = network.build(kind)
    narrow, before = of_first_filters(model, keep), filters(model)
    network.plant(model, **{planted: share})
    torch.testing.assert_close(model(IMAGES), narrow(IMAGES), rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), torch.arange(6)).backward()
        optimizer.step()
    for now, old in zip(filters(model), before, strict=True):
        assert not torch.equal(now[:keep], old[:keep])
        if planted == "dead":
            assert torch.equal(now[keep:, :-1], old[keep:, :-1])
        else:
            torch.testing.assert_close(now[keep:], now[torch.arange(keep, 32) % keep], rtol=0, atol=1e-6)


def overlap(weights: list[np.ndarray]) -> float:
    """Squared cosines of all pairs of different filters, each pair counted twice."""
    rows = [weight.reshape(len(weight), -1) for weight in weights]
    cosines = [1 - cdist(row, row, "cosine") for row in rows]
    return sum((matrix**2).sum() - len(matrix) for matrix in cosines)


def test_a_step_minimises_the_loss_that_the_options_name(feed):
    chosen = settings(batch_size=40, epochs=1, distill=0.3, temperature=4.0, ortho_reg=0.01, seed=5)
    feed.teacher = torch.randn(40, 10, generator=torch.Generator().manual_seed(1))
    _, record = training.train(chosen, feed)
    torch.manual_seed(5)
    model = network.build("3x3")
    pixels = feed.train.pixels.numpy().astype(float)
    pixels = (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    logits = model(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)).detach().double().numpy()
    student, wanted = log_softmax(logits / 4, 1), log_softmax(feed.teacher.double().numpy() / 4, 1)
    loss = 0.7 * -log_softmax(logits, 1)[range(40), feed.train.classes].mean()
    loss += 0.3 * 16 * (np.exp(wanted) * (wanted - student)).sum(1).mean()
    loss += 0.01 * overlap([c.weight.detach().double().numpy() for c in network.convs(model)])
    assert record["loss_curve"] == [pytest.approx(loss, rel=1e-5)]
    model[3].weight.data[5] = 0  # dropped: left alone
    training.overlap_penalty(model).backward()
    assert model[3].weight.grad[5].count_nonzero() == 0 and model[3].weight.grad.isfinite().all()


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


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_every_optimizer_trains_with_the_first_conv_left_out(feed, optimizer):
    options = {"optimizer": optimizer, "lr": training.OPTIMIZERS[optimizer][2], "lr_half_life": 25.0}
    _, record = training.train(settings(row="taylor", skip_first=True, max_drop_per_layer=1.0, **options), feed)
    assert record["loss_curve"][-1] < record["loss_curve"][0] and record["diverged"] is None
    assert {name for event in record["events"] for name in event["dropped"]} <= {"3", "6"}


def test_a_run_that_diverges_stops_and_says_so(feed):
    _, record = training.train(settings(row="ortho", optimizer="sgd", lr=1e8), feed)
    assert record["diverged"] <= 2 and len(record["loss_curve"]) == record["diverged"]
    assert record["final"] == record["curve"][-1] and record["loss_curve"][-1] is None


def test_influence_is_the_accuracy_without_the_filter_and_is_drawn(feed, tmp_path):
    model, record = training.train(settings(epochs=2), feed)
    worth = cifar10_influence.influence(model, feed)
    whole = training.accuracy(model, feed, feed.test)
    for name, index in (("0", 3), ("6", 31)):
        twin = copy.deepcopy(model)
        twin[int(name)].weight.data[index] = twin[int(name)].bias.data[index] = 0
        assert worth[name][index] == pytest.approx(whole - training.accuracy(twin, feed, feed.test))
    lines, runs = tmp_path / "influence.jsonl", tmp_path / "runs.jsonl"
    records.append(lines, {"key": settings(epochs=2).key, "influence": worth})
    records.append(runs, record)
    cifar10_influence.draw(lines, runs, tmp_path / "influence.svg")
    assert (tmp_path / "influence.svg").read_text().count("filter, by influence") == 3


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


def test_training_begins_with_the_first_weights_and_plants_nothing_again(feed):
    start, _ = training.train(settings(epochs=1, seed=1, dead=0.5), feed)
    after, _ = training.train(settings(lr=1e-12, seed=1, dead=0.5, epochs=10, **WARM), feed, start=start)
    for name, value in start.state_dict().items():
        assert torch.allclose(value, after.state_dict()[name], atol=1e-8)
