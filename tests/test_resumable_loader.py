"""Where a training loader goes on: exactly where nothing changed, else at the epoch that the run was in; never a hang,
never a raw error, and a loader of the user's own is left alone."""

import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader

from repr_det.network.state import random_state
from repr_det.runs.loader import ResumableLoader, resumable
from repr_det.runs.resume import ExactResume


def images(number):
    """Every second one is wide."""
    sizes = ((10, 20), (20, 10))
    return [
        dict(image_id=i, file_name=f"{i}.png", height=sizes[i % 2][0], width=sizes[i % 2][1]) for i in range(number)
    ]


def mapper(record):
    return {**record, "noise": np.random.rand()}


def other_mapper(record):
    return {**record, "noise": 0.0}


def stock(number=10, batch=3, grouping=True, workers=0, sampler=None, mapper=mapper, **kwargs):
    return build_detection_train_loader(
        images(number),
        mapper=mapper,
        sampler=sampler or TrainingSampler(number, seed=4),
        total_batch_size=batch,
        aspect_ratio_grouping=grouping,
        num_workers=workers,
        **kwargs,
    )


def ids(batches):
    return [[sample["image_id"] for sample in batch] for batch in batches]


def before_train(loader, saved, iteration, caplog):
    """What ExactResume does with a checkpoint of ``iteration`` iterations; the warnings."""
    hook = ExactResume(torch.nn.Linear(1, 1), [loader], 100, 0, "nowhere")
    storage = SimpleNamespace(iter=0)
    hook.trainer = SimpleNamespace(start_iter=iteration, max_iter=99, iter=iteration, storage=storage, _hooks=[hook])
    if saved is not None:
        hook.load_state_dict({"iteration": iteration - 1, "ranks": saved, "scalars": {}})
    with caplog.at_level(logging.WARNING, "repr_det.resume"):
        hook.before_train()
        hook.before_step()
    return [record.getMessage() for record in caplog.records if record.name.startswith("repr_det")]


def states(loader, batches):
    """Of a run that has drawn so many batches, as its only rank."""
    assert len(list(itertools.islice(loader, batches))) == batches
    return [{"random": random_state(), "loaders": [loader.state_dict()]}]


def sampler_of(kind, number=10):
    if kind == "subset":
        return RandomSubsetTrainingSampler(number, 0.5)  # seeds drawn anew in every process
    if kind == "repeat":
        return RepeatFactorTrainingSampler(torch.linspace(1, 2.5, number), seed=4)
    return TrainingSampler(number)


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("kind", ["plain", "subset", "repeat"])
def test_goes_on_exactly_where_nothing_changed(kind, grouping, caplog):
    np.random.seed(1)
    saved = states(ResumableLoader(stock(grouping=grouping, sampler=sampler_of(kind))), 5)
    np.random.seed(99)
    resumed = ResumableLoader(stock(grouping=grouping, sampler=sampler_of(kind)))
    assert before_train(resumed, saved, 5, caplog) == []
    again = list(itertools.islice(resumed, 6))
    np.random.seed(1)
    undisturbed = list(itertools.islice(stock(grouping=grouping, sampler=sampler_of(kind)), 11))
    assert again == undisturbed[5:]


CHANGES = {
    "batch size": (dict(batch=2), "number of images per process and batch was 6 and is 2"),
    "larger batch": (dict(batch=7), "number of images per process and batch was 6 and is 7"),
    "workers": (dict(workers=1), "DATALOADER.NUM_WORKERS was 0 and is 1"),
    "grouping": (dict(grouping=False), "aspect-ratio grouping was True and is False"),
    "fewer images": (dict(number=4), "number of training images was 10 and is 4"),
    "more images": (dict(number=12), "number of training images was 10 and is 12"),
    "mapper": (dict(mapper=other_mapper), "mapper was mapper and is other_mapper"),
    "sampler": (
        dict(sampler=RepeatFactorTrainingSampler(torch.ones(10), seed=3)),
        "sampler was TrainingSampler and is RepeatFactorTrainingSampler",
    ),
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_starts_over_at_its_epoch_where_something_changed(change, old_format, caplog):
    np.random.seed(1)
    saved = states(ResumableLoader(stock(batch=6)), 3)  # 18 images and 5 that wait: the third epoch
    assert [len(bucket) for bucket in saved[0]["loaders"][0]["buckets"]] == [0, 5]
    if old_format:
        for key in ("made_of", "epoch", "skipped"):
            del saved[0]["loaders"][0][key]
    new, told = CHANGES[change]
    made = {"number": 10, "batch": 6, **new}
    resumed = ResumableLoader(stock(**made))
    warnings = before_train(resumed, saved, 3, caplog)
    if old_format and not warnings:  # what an old checkpoint does not tell and what does no harm goes on
        assert change in ("larger batch", "more images", "mapper", "sampler", "fewer images")
    else:
        assert len(warnings) == 1 and "the data order of this run starts over at its epoch" in warnings[0]
        assert old_format or warnings[0].startswith(told)
    number, batch = made["number"], made["batch"]
    drawn = ids(itertools.islice(resumed, 3 * number // batch))  # neither hangs nor fails
    assert all(len(x) == batch for x in drawn)
    if warnings and change not in ("sampler", "workers"):
        # Images of the third epoch come first: the order of the old sampler's seed.
        third = list(itertools.islice(TrainingSampler(number, seed=4), 2 * number, 3 * number))
        flat = list(itertools.chain.from_iterable(drawn))
        assert set(flat[:batch]) <= set(third) and (made.get("grouping", True) or flat[:batch] == third[:batch])


def test_grouping_switched_on(caplog):
    saved = states(ResumableLoader(stock(grouping=False)), 4)
    resumed = ResumableLoader(stock(grouping=True))
    assert "aspect-ratio grouping was False and is True" in before_train(resumed, saved, 4, caplog)[0]
    assert len(list(itertools.islice(resumed, 5))) == 5


@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 2)])
def test_another_number_of_processes(old, new, caplog, monkeypatch):
    def of_rank(rank, world, batch=4):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world)
        monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: world)
        return ResumableLoader(stock(batch=batch, grouping=False))

    saved = [states(of_rank(rank, old), 6)[0] for rank in range(old)]  # 24 images of 10: the third epoch
    first = []
    for rank in range(new):
        caplog.clear()
        resumed = of_rank(rank, new)
        (warning,) = before_train(resumed, saved, 6, caplog)
        assert f"number of processes was {old} and is {new}" in warning
        first.append(ids(itertools.islice(resumed, 2)))
    third = list(itertools.islice(TrainingSampler.__iter__(_single(10)), 20, 28))
    mixed = list(itertools.chain(*zip(*(itertools.chain(*batches) for batches in first), strict=True)))
    assert mixed == third


def _single(number):
    sampler = TrainingSampler(number, seed=4)
    sampler._rank, sampler._world_size = 0, 1
    return sampler


def test_a_run_that_started_over_is_resumed_exactly(caplog):
    saved = states(ResumableLoader(stock(batch=6)), 4)
    second = ResumableLoader(stock(batch=2))
    before_train(second, saved, 4, caplog)
    saved = states(second, 5)
    third = ResumableLoader(stock(batch=2))
    caplog.clear()
    assert before_train(third, saved, 9, caplog) == []
    reference = ResumableLoader(stock(batch=2))
    reference.stream.skipped = second.stream.skipped
    assert ids(itertools.islice(third, 6)) == ids(itertools.islice(reference, 11))[5:]


def test_no_random_states_in_the_checkpoint(caplog):
    resumed = ResumableLoader(stock(batch=2, grouping=False))
    (warning,) = before_train(resumed, None, 12, caplog)  # 24 images of 10
    assert "no random states" in warning
    assert ids(itertools.islice(resumed, 1))[0] == list(itertools.islice(TrainingSampler(10, seed=4), 20, 22))


def test_repeat_factors_start_over_at_the_beginning_of_an_epoch(caplog):
    sampler = sampler_of("repeat")
    g = torch.Generator().manual_seed(4)
    epochs = []
    for _ in range(3):
        indices = sampler._get_epoch_indices(g)
        epochs.append(indices[torch.randperm(len(indices), generator=g)].tolist())
    saved = states(ResumableLoader(stock(batch=6, sampler=sampler, grouping=False)), 7)  # 42 images of about 17.5
    resumed = ResumableLoader(stock(batch=2, sampler=sampler_of("repeat"), grouping=False))
    before_train(resumed, saved, 7, caplog)
    assert ids(itertools.islice(resumed, 4)) == [epochs[2][i : i + 2] for i in (0, 2, 4, 6)]


class Wrapper:
    def __init__(self, loader):
        self.dataset = loader

    def __iter__(self):
        return iter(self.dataset)


class OwnSampler(TrainingSampler):
    pass


def collate(batch):
    return batch


OWN = {
    "wrapper": lambda: Wrapper(stock()),
    "collate_fn": lambda: stock(collate_fn=collate),
    "collate_fn without grouping": lambda: stock(grouping=False, collate_fn=collate),
    "sampler": lambda: stock(sampler=OwnSampler(10)),
    "plain torch": lambda: DataLoader(images(4), batch_size=2),
    "generator": lambda: stock(seed=3),
    "list": lambda: [[1], [2]],
}


@pytest.mark.parametrize("kind", OWN)
def test_a_loader_of_the_users_own_is_left_alone(kind, caplog):
    loader = OWN[kind]()
    assert resumable(loader) is loader
    assert "The data order of a resumed run will start over: the training loader" in caplog.text


@pytest.mark.parametrize("grouping", [True, False])
def test_other_batch_size_and_grouping_than_in_the_config_are_kept(grouping):
    loader = resumable(stock(batch=5, grouping=grouping))
    assert isinstance(loader, ResumableLoader)
    drawn = ids(itertools.islice(loader, 8))
    assert {len(batch) for batch in drawn} == {5}
    assert any(len({i % 2 for i in batch}) > 1 for batch in drawn) is not grouping


def test_samples_need_not_be_dicts():
    loader = resumable(stock(grouping=False, mapper=lambda record: (record["image_id"], torch.zeros(2))))
    batch = next(iter(loader))
    assert [len(sample) for sample in batch] == [2, 2, 2]
