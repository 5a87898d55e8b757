"""Where a training loader goes on: exactly if nothing changed, else behind as many images as were drawn; never a hang,
never a raw error, and a loader of the user's own is left alone."""

import itertools
import logging
import random
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


@pytest.mark.parametrize("change", CHANGES)
def test_goes_on_behind_what_was_drawn_if_something_changed(change, caplog):
    np.random.seed(1)
    saved = states(ResumableLoader(stock(batch=6)), 3)  # 18 images and 5 that wait
    assert [len(bucket) for bucket in saved[0]["loaders"][0]["buckets"]] == [0, 5]
    new, told = CHANGES[change]
    made = {"number": 10, "batch": 6, **new}
    resumed = ResumableLoader(stock(**made))
    (warning,) = before_train(resumed, saved, 3, caplog)
    assert warning.startswith(told) and "the data order of this run is another one from here on" in warning
    number, batch = made["number"], made["batch"]
    drawn = ids(itertools.islice(resumed, 3 * number // batch))  # neither hangs nor fails
    assert all(len(x) == batch for x in drawn)
    if change not in ("sampler", "workers"):
        order = list(itertools.islice(TrainingSampler(number, seed=4), 23, 23 + 4 * batch))  # of the old sampler's seed
        flat = list(itertools.chain.from_iterable(drawn))
        assert set(flat[:batch]) <= set(order) and (made.get("grouping", True) or flat[:batch] == order[:batch])


def test_a_checkpoint_that_does_not_say_what_its_order_was_of(caplog):
    saved = states(ResumableLoader(stock(batch=6, grouping=False)), 3)
    del saved[0]["loaders"][0]["made_of"]
    resumed = ResumableLoader(stock(batch=6, grouping=False))
    assert "of an older version does not say" in before_train(resumed, saved, 3, caplog)[0]
    assert ids(itertools.islice(resumed, 1))[0] == list(itertools.islice(TrainingSampler(10, seed=4), 18, 24))


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

    saved = [states(of_rank(rank, old), 6)[0] for rank in range(old)]  # 24 images of 10
    first = []
    for rank in range(new):
        caplog.clear()
        resumed = of_rank(rank, new)
        (warning,) = before_train(resumed, saved, 6, caplog)
        assert f"number of processes was {old} and is {new}" in warning
        first.append(ids(itertools.islice(resumed, 2)))
    behind = list(itertools.islice(TrainingSampler.__iter__(_single(10)), 24, 32))
    mixed = list(itertools.chain(*zip(*(itertools.chain(*batches) for batches in first), strict=True)))
    assert mixed == behind


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
    assert ids(itertools.islice(resumed, 1))[0] == list(itertools.islice(TrainingSampler(10, seed=4), 24, 26))


def test_repeat_factors_go_on_behind_what_was_drawn(caplog):
    order = list(itertools.islice(sampler_of("repeat"), 60))
    saved = states(ResumableLoader(stock(batch=6, sampler=sampler_of("repeat"), grouping=False)), 7)
    resumed = ResumableLoader(stock(batch=2, sampler=sampler_of("repeat"), grouping=False))
    before_train(resumed, saved, 7, caplog)
    assert ids(itertools.islice(resumed, 4)) == [order[i : i + 2] for i in (42, 44, 46, 48)]


class Brightness:
    def __init__(self, generator):
        self.generator = generator


class Mapper:
    """An augmentation of its own, and images that it cannot use."""

    def __init__(self, generator=None, unusable=()):
        self.augmentations, self.unusable = [Brightness(generator)], unusable

    def __call__(self, record):
        return None if record["image_id"] in self.unusable else record


@pytest.mark.parametrize(
    "generator",
    [np.random.default_rng(3), np.random.RandomState(3), random.Random(3), torch.Generator().manual_seed(3), None],
)
def test_a_generator_that_no_checkpoint_holds_is_named(generator, caplog):
    resumable(stock(mapper=Mapper(generator)))
    named = f"draws from a random generator of its own ({type(generator).__name__}), which no checkpoint holds"
    assert (named in caplog.text) == (generator is not None)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("unusable", [(), (3, 4)])
def test_a_mapper_that_gives_none_is_named_once(unusable, workers, caplog):
    loader = resumable(stock(mapper=Mapper(unusable=unusable), workers=workers))
    assert len(list(itertools.islice(loader, 8))) == 8
    assert caplog.text.count("The mapper returns None for some images") == bool(unusable)


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
