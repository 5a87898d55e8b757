"""examples/cifar10.py on data of 40 training and 20 test images."""

import dataclasses
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cifar10
import numpy as np
import pytest
import torch
from cifar import data, network, records, report, training
from cifar.records import Settings
from cifar_study import NUMBERS, TINY, run_main, settings, tiny_feed, tiny_parts
from conftest import ROOT
from PIL import Image

from repr_det import UserError

EXAMPLES = ROOT / "examples"
WITHOUT_DETECTRON2 = f"""
import runpy, sys
sys.modules["detectron2"] = sys.modules["fvcore"] = None
sys.path.insert(0, {str(EXAMPLES)!r})
runpy.run_path({str(EXAMPLES / "cifar10.py")!r}, run_name="__main__")
"""
AS_A_PROGRAM = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
from cifar import data
data.NUMBERS.update({NUMBERS})
import cifar10
cifar10.main()
"""


def png(pixels: torch.Tensor) -> bytes:
    text = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(text, format="png")
    return text.getvalue()


@pytest.fixture
def numbers(monkeypatch):
    monkeypatch.setattr(data, "NUMBERS", NUMBERS)


@pytest.fixture
def folder(tmp_path, numbers) -> Path:
    root = tmp_path / "images"
    for part, images in tiny_parts().items():
        for index, label in enumerate(images.classes.tolist()):
            file = root / part / data.CLASSES[label] / f"{index:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(images.pixels[index]))
    return root


@pytest.fixture
def batches(tmp_path, numbers) -> Path:
    """As torchvision unpacks them, with the classes mixed."""
    root = tmp_path / "torchvision"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    parts = tiny_parts()
    draw = torch.Generator().manual_seed(1)
    order = {part: torch.randperm(number, generator=draw) for part, number in NUMBERS.items()}
    for name, part, rows in [
        *((f"data_batch_{i + 1}", "train", rows) for i, rows in enumerate(order["train"].split(8))),
        ("test_batch", "test", order["test"]),
    ]:
        images = parts[part].take(rows)
        raw = {b"data": images.pixels.permute(0, 3, 1, 2).flatten(1).numpy(), b"labels": images.classes.tolist()}
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(raw))
    return root


@pytest.fixture
def feed(numbers) -> training.Feed:
    return tiny_feed()


# Data


def labelled(images: data.Images) -> set[tuple[bytes, int]]:
    return {(p.numpy().tobytes(), int(c)) for p, c in zip(images.pixels, images.classes, strict=True)}


def test_folder_zip_and_batches_are_the_same_images(folder, batches, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for image in sorted(folder.rglob("*.png")):
            file.write(image, image.relative_to(folder))
            file.writestr(f"__MACOSX/{image.relative_to(folder).parent}/._{image.name}", b"not an image")
    wanted = tiny_parts()
    found = {source: data.load(source, tmp_path / "cache") for source in (folder, archive, batches)}
    for held in (found[folder], found[archive]):
        assert torch.equal(held.train.pixels, wanted["train"].pixels)
        assert torch.equal(held.test.classes, wanted["test"].classes)
    assert found[folder].digest == found[archive].digest
    assert labelled(found[batches].train) == labelled(wanted["train"])
    assert labelled(found[batches].test) == labelled(wanted["test"])
    inside = data.load(batches / "cifar-10-batches-py", tmp_path / "cache")
    assert inside.digest == found[batches].digest != found[folder].digest


def test_images_are_decoded_once(folder, tmp_path, monkeypatch):
    first = data.load(folder, tmp_path / "cache")
    monkeypatch.setattr(data, "_decode", None)
    assert data.load(folder, tmp_path / "cache").digest == first.digest
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_subset_has_equally_many_of_each_class(batches, tmp_path):
    train = data.load(batches, tmp_path).train
    for number in (10, 25, 40):
        part = data.balanced(train, number)
        counts = torch.bincount(part.classes, minlength=10)
        assert len(part) == number and counts.max() - counts.min() <= 1
    wanted = train.pixels[(train.classes == 3).nonzero()[0, 0]]
    assert torch.equal(data.balanced(train, 10).pixels[3], wanted)


def remove(path: Path) -> None:
    for file in path.rglob("*.png"):
        file.unlink()
    path.rmdir() if path.is_dir() else path.unlink()


BROKEN_FOLDERS = [
    (lambda root: remove(root / "train" / "frog"), "/train/frog is missing: "),
    (lambda root: remove(root / "train" / "frog" / "0024.png"), " train must have 4 images of class frog, got 3: "),
    (lambda root: (root / "test").rename(root / "tset"), " has no folder test/: it must hold train/CLASS/*.jpg and"),
    (lambda root: (root / "test/cat/0006.png").write_bytes(b"\x89PNG"), "cat/0006.png cannot be read as an image"),
    (
        lambda root: (root / "test/cat/0006.png").write_bytes(png(torch.zeros(32, 28, 3, dtype=torch.uint8))),
        "/test/cat/0006.png must be 32 x 32 pixels, got 28 x 32",
    ),
    (lambda root: root.rename(root.parent / "elsewhere"), "images does not exist: give a folder with train/ and test/"),
]


@pytest.mark.parametrize(("damage", "line"), BROKEN_FOLDERS)
def test_a_broken_folder_is_named_in_one_line(folder, tmp_path, damage, line):
    damage(folder)
    with pytest.raises(UserError, match=re.escape(line)) as raised:
        data.load(folder, tmp_path / "cache")
    assert "\n" not in str(raised.value) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("data_batch_3", None, "data_batch_3 is missing: unpack"),
        ("test_batch", b"no pickle", "test_batch is not a batch of CIFAR-10 (UnpicklingError)"),
        ("test_batch", pickle.dumps({b"data": os.system}), "test_batch is not a batch of CIFAR-10 (UnpicklingError)"),
        ("test_batch", pickle.dumps({b"labels": []}), "test_batch is not a batch of CIFAR-10 (KeyError)"),
    ],
)
def test_a_broken_batch_is_named_in_one_line(batches, tmp_path, name, content, line):
    file = batches / "cifar-10-batches-py" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(line)):
        data.load(batches, tmp_path / "cache")


def test_a_broken_zip_is_named_in_one_line(folder, tmp_path):
    archive = tmp_path / "images.zip"
    archive.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"images.zip is neither a folder nor a zip file"):
        data.load(archive, tmp_path / "cache")
    with zipfile.ZipFile(archive, "w") as file:
        file.write(next((folder / "train" / "airplane").iterdir()), "train/airplane/0.png")
    with pytest.raises(UserError, match=r"images.zip has no train/automobile/: it must hold train/CLASS/\*.jpg"):
        data.load(archive, tmp_path / "cache")


# Options


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--epochs 0", "--epochs must be 1 to 100000, got 0"),
        ("--train-images 50001", "--train-images must be 10 to 50000, got 50001"),
        ("--dropout 1", "--dropout must be 0 to 0.99, got 1.0"),
        ("--distill 1.5", "--distill must be 0 to 1, got 1.5"),
        ("--lr 0", "--lr must be above 0, got 0.0"),
        ("--lr nan", "--lr must be above 0, got nan"),
        ("--ortho-reg nan", "--ortho-reg must be 0 to 1000, got nan"),
        ("--seeds -1", "--seeds must be at least 0 and below 2^63, got -1"),
        ("--drop-ratio 1.3", "drop_ratio= must be in (0, 1), got 1.3"),
        ("--drop-ratio 0.6", "max_drop_per_layer= must be at least drop_ratio= 0.6, got 0.5"),
        ("--cycles 4 --s1 20", "the schedule of RePr needs"),
        ("--epochs 1 --batch-size 40", "s1_iters= must be an integer of at least 1, got 0"),
        ("--device nowhere", "--device nowhere cannot be used: "),
    ],
)
def test_a_wrong_option_is_named_before_training(folder, tmp_path, options, line):
    arguments = ["--data", str(folder), "--output", str(tmp_path / "out"), *TINY, *options.split()]
    with pytest.raises(UserError, match=re.escape(line)):
        cifar10.study(cifar10.parse(arguments))
    assert not (tmp_path / "out" / "runs.jsonl").exists()


def test_the_program_needs_no_detectron2_and_ends_with_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-c", WITHOUT_DETECTRON2, "--data", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("cifar10.py: error: --data ") and done.stderr.count("\n") == 1


def test_released_setting_is_the_authors_schedule():
    args = cifar10.parse(["--setting", "released", "--train-images", "45000", "--rows", "ortho_released"])
    (run,) = cifar10.plan(args, "digest")[:1]
    schedule = training.schedule_of(run)
    steps = -(-45_000 // 64)  # the author leaves the last batch of an epoch out
    assert (schedule.s1_iters, schedule.s2_iters, schedule.num_cycles) == (20 * steps, 20 * steps, 9)
    assert run.epochs * steps - schedule.end_iter == 19 * steps
    assert run.lr_half_life / 100 * run.epochs * (steps - 1) == pytest.approx(25_000)
    assert (run.network, run.optimizer, run.lr, run.drop_ratio) == ("5x5", "sgd", 0.05, 0.5)


# Network and loss


def test_pooling_of_the_released_network_pads_the_far_edge_only():
    pool = network.build("5x5")[1]
    rows = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    padded = np.pad(rows, (0, 1), constant_values=-np.inf)
    wanted = [[padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max() for j in range(16)] for i in range(16)]
    np.testing.assert_array_equal(pool(torch.tensor(rows)[None])[0], wanted)


@pytest.mark.parametrize("kind", [*network.NETWORKS, network.TEACHER])
def test_networks_classify(kind):
    torch.manual_seed(0)
    assert network.build(kind)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_c3_has_the_weights_that_its_layers_need():
    sizes = [3 * 9 * 32 + 32, 32 * 9 * 32 + 32, 32 * 9 * 32 + 32, 32 * 4 * 4 * 10 + 10]
    assert sum(p.numel() for p in network.build("3x3").parameters()) == sum(sizes)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def soft_loss(logits: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    student, wanted = softmax(logits / temperature), softmax(teacher / temperature)
    return temperature**2 * (wanted * (np.log(wanted) - np.log(student))).sum(1).mean()


def overlap(weights: list[np.ndarray]) -> float:
    """Squared cosines of all pairs of different filters, each pair counted twice."""
    total = 0.0
    for weight in weights:
        rows = [row for row in weight.reshape(len(weight), -1) if np.linalg.norm(row) > 0]
        for i, a in enumerate(rows):
            total += sum((a @ b / np.linalg.norm(a) / np.linalg.norm(b)) ** 2 for j, b in enumerate(rows) if i != j)
    return total


def test_distillation_is_its_closed_form():
    draw = np.random.default_rng(0)
    logits, teacher = draw.normal(size=(2, 6, 10)) * 3
    for temperature in (1.0, 4.0):
        found = training.distillation(torch.tensor(logits), torch.tensor(teacher), temperature)
        assert found.item() == pytest.approx(soft_loss(logits, teacher, temperature))


def test_overlap_penalty_is_its_closed_form_and_leaves_dropped_filters_alone():
    torch.manual_seed(0)
    model = network.build("3x3").double()
    with torch.no_grad():
        model[3].weight[5] = 0
    penalty = training.overlap_penalty(model)
    assert penalty.item() == pytest.approx(overlap([c.weight.detach().numpy() for c in network.convs(model)]))
    penalty.backward()
    assert model[3].weight.grad[5].count_nonzero() == 0 and model[3].weight.grad.isfinite().all()


def test_a_step_minimises_the_loss_that_the_options_name(feed):
    chosen = settings(batch_size=40, epochs=1, distill=0.3, temperature=4.0, ortho_reg=0.01, seed=5)
    feed.teacher = torch.randn(40, 10, generator=torch.Generator().manual_seed(1))
    _, record = training.train(chosen, feed)
    torch.manual_seed(5)
    model = network.build("3x3")
    pixels = feed.train.pixels.numpy().astype(float)
    pixels = (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    logits = model(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)).detach().double().numpy()
    hard = -np.log(softmax(logits)[range(40), feed.train.classes]).mean()
    wanted = 0.7 * hard + 0.3 * soft_loss(logits, feed.teacher.double().numpy(), 4.0)
    wanted += 0.01 * overlap([c.weight.detach().double().numpy() for c in network.convs(model)])
    assert record["loss_curve"] == [pytest.approx(wanted, rel=1e-5)]


# Training


def test_both_arms_train_the_same_until_the_first_drop(feed):
    other = training.train(settings(seed=1), feed)[1]["loss_curve"]
    for dropout in (0.0, 0.5):
        plain = training.train(settings(dropout=dropout), feed)[1]["loss_curve"]
        assert plain[0] != other[0]
        for row in ("ortho", "taylor"):
            _, record = training.train(settings(row=row, dropout=dropout), feed)
            assert record["loss_curve"][:2] == plain[:2] and record["loss_curve"][2] != plain[2]
            assert [event["epoch"] for event in record["events"]] == [2, 3, 5, 6, 8, 9]
            assert sum(map(len, record["events"][0]["dropped"].values())) == 28


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_every_optimizer_trains_with_the_first_conv_left_out(feed, optimizer):
    options = {"optimizer": optimizer, "lr": training.OPTIMIZERS[optimizer][2], "lr_half_life": 25.0}
    _, record = training.train(settings(row="ortho", skip_first=True, max_drop_per_layer=1.0, **options), feed)
    assert record["loss_curve"][-1] < record["loss_curve"][0] and record["diverged"] is None
    assert {name for event in record["events"] for name in event["dropped"]} <= {"3", "6"}


def test_a_run_that_diverges_stops_and_says_so(feed):
    for row in ("standard", "ortho"):
        _, record = training.train(settings(row=row, optimizer="sgd", lr=1e8), feed)
        assert record["diverged"] <= 2 and len(record["loss_curve"]) == record["diverged"]
        assert record["final"] == record["curve"][-1] and record["loss_curve"][-1] is None
    table = report.table([(settings(), record)])
    assert "1, 1 diverged" in table


def test_influence_is_the_accuracy_without_the_filter(feed):
    for kind in network.NETWORKS:
        model, _ = training.train(settings(network=kind, epochs=3), feed)
        images, classes = feed.batch(feed.test, slice(None))
        found = training.influence(model, feed)
        assert list(found) == ["0", "3", "6"] and all(len(values) == 32 for values in found.values())
        model.eval()
        with torch.no_grad():
            whole = 100 * (model(images).argmax(1) == classes).double().mean()
            for name, values in found.items():
                conv = model.get_submodule(name)
                for index in range(0, 32, 5):
                    kept = conv.weight[index].clone(), conv.bias[index].clone()
                    conv.weight[index], conv.bias[index] = 0, 0
                    without = 100 * (model(images).argmax(1) == classes).double().mean()
                    conv.weight[index], conv.bias[index] = kept
                    assert values[index] == pytest.approx(float(whole - without))
        assert len({value for values in found.values() for value in values}) > 1


# Records


def test_lines_are_whole_and_old_ones_stay_valid(tmp_path):
    file = tmp_path / "runs.jsonl"
    old = {"row": "standard", "seed": 4, "data": "abc"}  # from before other settings came
    records.append(file, {"settings": old, "final": 1.0})
    with open(file, "ab") as lines:
        lines.write(b'{"settings": {"row": "standard", "se')  # killed here
    assert [s for s, _ in records.read(file)] == [Settings(seed=4, data="abc")]
    records.append(file, {"settings": dataclasses.asdict(Settings(seed=5, data="abc")), "final": 2.0})
    assert [(s.seed, r["final"]) for s, r in records.read(file)] == [(4, 1.0), (5, 2.0)]
    assert Settings(**old).key == Settings(seed=4, data="abc").key != Settings(seed=5, data="abc").key
    records.append(file, {"settings": {"row": "standard", "colour": "red"}})
    with pytest.raises(UserError, match=r"jsonl, line 3 is no run of this program \(.*colour.*\): delete the line"):
        records.read(file)


def test_a_run_that_another_process_trains_is_left_to_it(feed, tmp_path):
    with records.claimed(tmp_path / "claims", settings().key) as mine:
        assert mine
        cifar10.run(settings(), feed, tmp_path)
        assert not (tmp_path / "runs.jsonl").exists()
    cifar10.run(settings(), feed, tmp_path)
    cifar10.run(settings(), feed, tmp_path)
    assert len(records.read(tmp_path / "runs.jsonl")) == 1


def test_a_killed_study_goes_on_and_loses_no_finished_run(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--data", folder, "--output", tmp_path / "out", *TINY, "--rows", "standard", "ortho", "--jobs", "2"]
    command = [sys.executable, "-c", AS_A_PROGRAM, *map(str, arguments), "--seeds", *map(str, range(60))]
    lines = tmp_path / "out" / "runs.jsonl"
    study = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not lines.exists() or lines.read_bytes().count(b"\n") < 3:
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    study.send_signal(signal.SIGKILL)
    study.wait()
    finished = lines.read_bytes()
    time.sleep(1.0)
    assert lines.read_bytes() == finished  # its processes are gone too
    whole = finished[: finished.rfind(b"\n") + 1]
    assert whole.count(b"\n") < 120

    run_main(monkeypatch, *arguments[:-1], "1", "--seeds", *range(4))
    assert lines.read_bytes().startswith(whole)
    runs = [(s.row, s.seed) for s, _ in records.read(lines)]
    assert len(runs) == lines.read_bytes().count(b"\n") == len(set(runs))
    assert {(row, seed) for row in ("standard", "ortho") for seed in range(4)} <= set(runs)
    assert "ortho" in capsys.readouterr().out


def test_distilling_trains_the_teacher_once_and_draws_the_influence(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["--data", folder, "--output", out, *TINY, "--distill", "0.5", "--teacher-epochs", "1", "--seeds", "0"]
    run_main(monkeypatch, *arguments, "--rows", "standard", "--influence")
    run_main(monkeypatch, *arguments, "--rows", "standard", "ortho", "--influence")
    held = records.read(out / "runs.jsonl")
    assert [(s.network, s.row) for s, _ in held] == [("teacher", "standard"), ("3x3", "standard"), ("3x3", "ortho")]
    assert held[1][0].teacher == held[0][0].key and not held[0][0].teacher
    assert [key for key, _ in records.read_influence(out)] == [held[1][0].key, held[2][0].key]
    assert "influence of every filter in 2 networks" in capsys.readouterr().out
    assert (out / "influence.svg").read_text().count("filter, by influence") == 3
