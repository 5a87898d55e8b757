"""docs/evidence: its tables against the runs and against a hand count, and what its studies train."""

import dataclasses
import json
from pathlib import Path

import averages
import cifar10
import cifar10_equal_fit as fit
import cifar10_tables
import fine_tuning_report as report
import modern
import numpy as np
import pytest
import tables
import torch
from cifar import data, network, records, training
from cifar.records import Settings
from PIL import Image
from torch import nn

from repr_det import UserError

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def test_the_table_pairs_forms_with_the_baseline_of_the_same_setting(tmp_path):
    def line(name, seed, ap, rate=0.04, **more):
        cfg = {"SOLVER.BASE_LR": rate, "REPR.ENABLED": name == "repr"}
        return json.dumps({"run": {"name": name, "seed": seed, "data": "bccd", "cfg": cfg, **more}, "AP": ap})

    file = tmp_path / "runs.jsonl"
    lines = [line("base", 1, 58.0), line("base", 2, 60.0), line("other rate", 1, 10.0, rate=0.02)]
    lines += [line("longer", 1, 20.0, iterations=2400)]
    lines += [line("repr", 1, 55.0), line("repr", 2, 59.0), line("repr", 3, 0.0)]
    file.write_text("\n".join(lines))
    found = report.lines(*report.read(file, None))
    assert [line[1] for line in found] == ["**other rate**", "**base**", "repr", "**longer**"]
    # -3 and -1: mean -2, t(0.975, 1) = 12.7062, sd 1.41421 / sqrt 2
    assert found[2][2:] == ("3", "38.0 ± 33.0", "-2.0 (-14.7 .. +10.7, 2 pairs)")
    file.write_text(json.dumps({**json.loads(lines[0]), "average": {"ema": {"AP": 59.0}}}))
    assert report.lines(*report.read(file, "ema"))[0][3] == "59.0"


def cifar_run(row, seed, curve, train, **own):
    settings = {"row": row, "seed": seed, "train_images": 100, "optimizer": "sgd", "lr": 0.05}
    settings |= {"weight_decay": 0.0, "s1": None}
    epochs = list(range(1, len(curve) + 1))
    return {"settings": settings | own, "curve": curve, "train_curve": train, "curve_epochs": epochs}


def test_a_repr_network_is_held_against_the_standard_one_where_it_fitted_as_well():
    rises = list(range(10, 110, 10))
    standard = cifar_run("standard", 0, [50, 56, 60, 62, 61, 60, 59, 58, 57, 56], rises)
    repr_run = cifar_run("ortho", 0, [50, 56, 60, 40, 50, 59, 60, 60, 60, 61], [10, 20, 30, 10] + 6 * [40], s1=20)
    other = cifar_run("ortho", 1, [0] * 10, rises)
    nothing_dropped = standard | {"settings": standard["settings"] | {"row": "redundant", "s1": 20}}
    assert fit.pairs([standard, repr_run, other, nothing_dropped]) == [(standard, repr_run)]
    # the standard network reached 40 at epoch 4, where it tested (60 + 62 + 61) / 3
    expected = ["40.0, 61.0", "100.0, 56.0", "+5.0", "epoch 4: 61.0", "+0.0"]
    assert fit.line(standard, repr_run) == ["100 images, sgd", "ortho", "0", *expected]
    assert fit.first_at(standard, 99) is None
    longer = standard | {"curve_epochs": list(range(22, 42, 2)), "train_curve": list(range(1, 41))}
    assert fit.end(longer) == (40, 56, None)  # epoch 40 of 40, tested every other epoch


def test_pairs_with_planted_filters_do_not_count_for_the_verdict():
    runs = [cifar_run("ortho", 0, [40] * 10, [101] * 10, s1=5)]  # the standard one never fits as well
    for own in ({}, {"duplicates": 0.5}):
        runs.append(cifar_run("standard", 0, [50] * 10, list(range(10, 110, 10)), **own))
        runs += [cifar_run("ortho", 0, [test] * 10, [50] * 10, s1=s1, **own) for test, s1 in ((40, 20), (60, 10))]
    assert fit.differences(runs) == {100: [-10.0, 10.0]}


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_the_pages_are_those_of_the_runs(page):
    text = page.read_text()
    assert tables.renewed(text) == text, "docs/evidence/tables.py rewrites them"


def test_every_table_is_on_a_page_and_a_changed_cell_is_seen():
    pages = "".join(page.read_text() for page in tables.PAGES)
    assert sorted(name for _, name in tables.TABLE.findall(pages)) == sorted(tables.TABLES)
    page = (FOLDER / "fine_tuning.md").read_text()
    assert tables.renewed(page.replace("**f4_base** | ", "**f4_base** | 1")) == page


def test_the_verdict_at_equal_fit_is_what_the_texts_say():
    found = fit.differences(fit.runs())
    whole = found.pop(50_000)
    others = [value for values in found.values() for value in values]
    said = [f"worse in {sum(x < 0 for x in others)} of {len(others)} pairs on up to 25,000 images"]
    said += [f"in {sum(x < 0 for x in whole)} of {len(whole)}", f"{np.mean(whole):+.1f}"]
    for page in (ROOT / "docs" / "results.md", FOLDER / "cifar10.md"):
        text = " ".join(page.read_text().split())
        assert all(part in text for part in said)


def test_a_line_of_the_cifar_tables_is_the_runs_of_its_options(tmp_path):
    def lines(options, *finals):
        args = cifar10.parse([*options.split(), "--seeds", *map(str, range(len(finals)))])
        for settings, value in zip(cifar10.plan(args, "digest"), finals, strict=True):
            record = {"final": value, "best": value + 1, "train": 2 * value}
            record |= {"curve": [0, value], "curve_epochs": [1, 60]}
            yield json.dumps({**record, "settings": vars(settings)}) + "\n"

    small = cifar10_tables.SMALL
    with open(tmp_path / "runs.jsonl", "w") as file:
        file.writelines(lines(f"{small} --rows standard", 50.0, 51.0))
        file.writelines(lines(f"{small} --rows ortho", 48.0, 47.0, 90.0))
        file.writelines(lines(f"{small} --rows ortho --drop-ratio 0.1", 50.0))
    study = cifar10_tables.Study(tmp_path / "runs.jsonl")
    # -2 and -4: mean -3, t(0.975, 1) = 12.7062, sd 1.41421 / sqrt 2
    assert cifar10_tables.ablations(study).splitlines()[2:] == [
        "| SGD with momentum, 30 % dropped | 50.5 ± 0.7 | 61.7 ± 24.5 | -3.0 (-15.7 .. +9.7, 2 pairs) | 101, 123 |",
        "| 10 % dropped | | 50.0 | +0.0 (the same numbers, one pair) | 101, 100 |",
    ]


@pytest.mark.parametrize("study", [modern.LabelNoise, modern.ResNet20])
def test_a_study_trains_what_is_missing_and_tells_it_by_seed(study, monkeypatch, tmp_path):
    ends = {"standard": 50.0, "ortho": 52.0, "random": 49.0}
    trained = []

    def train(settings, images, cache):
        trained.append(settings)
        end = ends[settings.arm] + settings.seed
        record = {"settings": dataclasses.asdict(settings), "final": end, "best": end + 1, "train_curve": [80]}
        return None, {**record, "seconds": 1}

    monkeypatch.setattr(modern, "train", train)
    study(tmp_path).train_missing([0], None, tmp_path)
    study(tmp_path).train_missing([0, 1], None, tmp_path)
    assert len(trained) == len(set(trained)) == len(list(study(tmp_path).runs([0, 1])))
    lines = study(tmp_path).table().splitlines()[2:]
    assert lines[0] == "| standard | 2 | 50.5 ± 0.7 | | 51.5 ± 0.7 | | 80 |"
    assert lines[1] == "| ortho | 2 | 52.5 ± 0.7 | +2.0 (2 pairs) | 53.5 ± 0.7 | +2.0 (2 pairs) | 80 |"


def test_averages_end_as_the_page_says():
    records = [json.loads(line) for line in averages.RUNS.read_text().splitlines()]
    rows = [line.split("|") for line in averages.table(records).splitlines()]
    last = {(row[1].strip(), row[2].strip()): float(row[5].split()[0]) for row in rows[2:]}
    page = " ".join((ROOT / "docs" / "own_loop.md").read_text().split())
    assert f"ends at {last['50 %', 'averages=']:.1f} % accuracy, otherwise at {last['50 %', 'not told']:.1f} %" in page
    assert f"ends at {last['5 %', 'averages=']:.1f} % either way" in page
    assert f"{last['5 %', 'not told']:.1f}" == f"{last['5 %', 'averages=']:.1f}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of noise, brighter from class to class."""
    monkeypatch.setattr(data, "NUMBERS", {"train": 40, "test": 20})
    draw = np.random.default_rng(0)
    for part, number in data.NUMBERS.items():
        for label, name in enumerate(data.CLASSES):
            place = tmp_path / "images" / part / name
            place.mkdir(parents=True)
            for index in range(number // 10):
                pixels = draw.integers(0, 100, (32, 32, 3)) + 15 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    return tmp_path / "images"


def test_two_runs_may_decode_the_images_at_once(folder, tmp_path, monkeypatch):
    save, loaded = torch.save, []

    def save_as_another_run_begins(*arguments):
        save(*arguments)
        monkeypatch.setattr(torch, "save", save)
        loaded.append(data.load(folder, tmp_path))

    monkeypatch.setattr(torch, "save", save_as_another_run_begins)
    loaded.append(data.load(folder, tmp_path))
    assert loaded[0].digest == loaded[1].digest and len(list(tmp_path.glob("*.pt"))) == 1


@pytest.mark.parametrize("arm", ["standard", "ortho"])
def test_a_killed_run_of_a_study_goes_on_as_if_nothing_had_happened(folder, tmp_path, monkeypatch, arm):
    images = data.load(folder, tmp_path)
    run = modern.Settings(arm, 0, "C3(32)", 40, 10, 8, 0.01, 1e-3, True, noise=0.4, s1=20.0, s2=10.0)
    whole, expected = modern.train(run, images, tmp_path)
    save, saved = torch.save, []

    def save_until_killed(*arguments):
        saved.append(1)
        if len(saved) == 6:  # the last file holds epoch 5: the second sub-network
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(torch, "save", save_until_killed)
    with pytest.raises(KeyboardInterrupt):
        modern.train(run, images, tmp_path)
    model, record = modern.train(run, images, tmp_path)
    assert len(saved) == 6 + 4  # epochs 6 to 9 again
    assert {**record, "seconds": 0} == {**expected, "seconds": 0}
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert len(list(tmp_path.glob("*.pt"))) == 1  # the decoded images


def settings(**options) -> Settings:
    common = {"train_images": 40, "batch_size": 8, "epochs": 10}
    if options.get("row", "standard") != "standard":
        common |= {"s1": 20.0, "s2": 10.0, "cycles": 3, "drop_ratio": 0.3, "max_drop_per_layer": 0.5}
        common |= {"skip_first": False, "scale": "kept", "criterion_batches": 2}
    return Settings(**(common | options))


def filters(model: nn.Module) -> list[torch.Tensor]:
    """A row a filter, its bias last."""
    return [torch.cat([c.weight.detach().flatten(1), c.bias.detach()[:, None]], 1) for c in network.convs(model)]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"duplicates": 0.5}, {"dead": 0.5}])
def test_standard_and_repr_train_the_same_until_the_first_drop(folder, tmp_path, options):
    images = data.load(folder, tmp_path)
    feed = training.Feed(images.train, images.test)
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
