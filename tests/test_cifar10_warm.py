"""examples/cifar10.py --warm-images: both arms go on from a standard network of fewer images."""

import cifar10
import pytest
import torch
from cifar import data, records, training
from cifar_study import TINY, run_main, settings, tiny_feed, tiny_parts

from repr_det import UserError

WARM = {"warm_images": 20, "warm_epochs": 2}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """``study(*options)`` -> the finished runs of the output folder."""
    images = data.Cifar10(**tiny_parts(), digest="tiny")
    monkeypatch.setattr(data, "load", lambda source, cache: images)

    def run(*options):
        run_main(monkeypatch, "--data", "tiny", "--output", tmp_path, *TINY, *options)
        return records.read(tmp_path / "runs.jsonl")

    return run


def test_the_first_run_is_trained_once_and_is_a_run_of_its_own(study):
    options = ["--warm-images", "20", "--warm-epochs", "2", "--seeds", "0", "1"]
    assert len(study(*options, "--rows", "standard")) == 4
    held = study(*options, "--rows", "standard", "ortho")
    assert [(s.row, s.seed, s.train_images, s.epochs, s.warm_images) for s, _ in held] == [
        ("standard", 0, 20, 2, 0),
        ("standard", 1, 20, 2, 0),
        ("standard", 0, 40, 10, 20),
        ("standard", 1, 40, 10, 20),
        ("ortho", 0, 40, 10, 20),
        ("ortho", 1, 40, 10, 20),
    ]
    assert study("--train-images", "20", "--epochs", "2", "--seeds", "0", "1", "--rows", "standard") == held


@pytest.mark.parametrize("row", ["standard", "ortho"])
def test_training_goes_on_from_its_weights(study, row):
    options = ["--warm-images", "20", "--warm-epochs", "2", "--seeds", "3", "--rows", row]
    warm, found = (record for _, record in study(*options))
    parts = tiny_parts()
    fewer = training.Feed(data.balanced(parts["train"], 20), parts["test"])
    model, by_hand = training.train(settings(train_images=20, epochs=2, data="tiny", seed=3), fewer)
    assert by_hand["curve"] == warm["curve"]
    _, wanted = training.train(settings(row=row, data="tiny", seed=3, **WARM), tiny_feed(), start=model)
    assert found["loss_curve"] == wanted["loss_curve"] and found["events"] == wanted["events"]
    _, new = training.train(settings(row=row, data="tiny", seed=3), tiny_feed())
    assert found["loss_curve"] != new["loss_curve"]


@pytest.mark.parametrize("planted", [{}, {"duplicates": 0.5}, {"dead": 0.5}])  # not planted a second time
def test_a_rate_of_next_to_nothing_leaves_the_first_weights(planted):
    start, _ = training.train(settings(train_images=20, epochs=1, seed=1), tiny_feed())
    after, _ = training.train(settings(lr=1e-12, seed=1, **WARM, **planted), tiny_feed(), start=start)
    for name, value in start.state_dict().items():
        assert torch.allclose(value, after.state_dict()[name], atol=1e-8)


def test_planted_filters_are_planted_once(study):
    options = ["--warm-images", "20", "--warm-epochs", "1", "--seeds", "0", "--rows", "standard", "--dead", "0.5"]
    (first, _), (second, _) = study(*options)
    assert first.dead == second.dead == 0.5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--warm-images 41", "--warm-images 41 are more than --train-images 40"),
        ("--warm-images 20 --warm-epochs 0", "--warm-images and --warm-epochs go together: one of them is 0"),
        ("--warm-epochs 3", "--warm-images and --warm-epochs go together: one of them is 0"),
        ("--warm-images -1", "--warm-images must be 0 to 50000, got -1"),
    ],
)
def test_wrong_options_are_named(options, line):
    args = cifar10.parse(["--data", "tiny", *TINY, *options.split()])
    with pytest.raises(UserError) as error:
        cifar10.check(args)
    assert line in str(error.value)


def test_first_weights_that_are_gone_are_trained_again(study, tmp_path):
    options = ["--warm-images", "20", "--warm-epochs", "1", "--seeds", "0", "--rows"]
    before = study(*options, "standard")
    file = cifar10.weights_file(tmp_path, before[0][0])
    weights = torch.load(file)
    file.unlink()
    after = study(*options, "standard", "ortho")
    assert after[:2] == before and [s.row for s, _ in after] == ["standard", "standard", "ortho"]
    assert all(torch.equal(value, weights[name]) for name, value in torch.load(file).items())


def test_a_record_that_a_kill_kept_from_being_written_comes_back(study, tmp_path):
    options = ["--warm-images", "20", "--warm-epochs", "1", "--seeds", "0", "--rows", "standard"]
    before = study(*options)
    (tmp_path / "runs.jsonl").unlink()  # the weights are written first
    assert [settings for settings, _ in study(*options)] == [settings for settings, _ in before]


def test_a_run_is_not_begun_with_new_weights_where_the_first_ones_are_gone(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights"):
        cifar10.run(settings(**WARM), tiny_feed(), tmp_path)
