"""A training loader resumes exactly if nothing changed, else behind as many images as were drawn."""

import itertools
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
    return [dict(image_id=i, file_name=f"{i}.png", height=10 + i % 2, width=11 - i % 2) for i in range(number)]


def mapper(record):
    return {**record, "noise": np.random.rand()}


def as_tuple(record):
    return record["image_id"], np.random.rand()


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


SAMPLERS = {
    "plain": lambda: TrainingSampler(10, seed=4),
    "subset": lambda: RandomSubsetTrainingSampler(10, 0.5),  # its seeds are drawn in every process
    "repeat": lambda: RepeatFactorTrainingSampler(torch.linspace(1, 2.5, 10), seed=4),
}


def order_of(sampler, first, number):
    sampler._rank, sampler._world_size = 0, 1
    return list(itertools.islice(sampler, first, first + number))


def ids(batches):
    return [[sample["image_id"] for sample in batch] for batch in batches]


def drawn(loader, batches):
    return list(itertools.islice(loader, batches))


def resumed(loader, saved, iteration, caplog):
    """Warnings of ExactResume with a checkpoint of ``iteration`` iterations."""
    hook = ExactResume(torch.nn.Linear(1, 1), [loader])
    hook.trainer = SimpleNamespace(start_iter=iteration, max_iter=99, iter=iteration, _hooks=[hook])
    hook.trainer.storage, hook.trainer.cfg = SimpleNamespace(iter=0), SimpleNamespace(OUTPUT_DIR="nowhere")
    if saved is not None:
        hook.load_state_dict({"iteration": iteration - 1, "ranks": saved, "scalars": {}})
    caplog.clear()
    hook.before_train()
    hook.before_step()
    return [record.getMessage() for record in caplog.records if record.name.startswith("repr_det")]


def states(loader, batches):
    """The states of a run on one rank that has drawn so many batches."""
    drawn(loader, batches)
    return [{"random": random_state(), "loaders": [loader.state_dict()]}]


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_goes_on_exactly_where_nothing_changed(kind, grouping, caplog):
    def loader():  # samples need not be dicts without grouping
        return stock(grouping=grouping, sampler=SAMPLERS[kind](), mapper=mapper if grouping else as_tuple)

    np.random.seed(1)
    saved = states(ResumableLoader(loader()), 5)
    np.random.seed(99)
    again = ResumableLoader(loader())
    assert resumed(again, saved, 5, caplog) == []
    found = drawn(again, 6)
    np.random.seed(1)
    assert found == drawn(loader(), 11)[5:]


OTHER = RepeatFactorTrainingSampler(torch.ones(10), seed=3)
CHANGES = [
    ({}, dict(batch=2), "number of images per process and batch was 6 and is 2"),
    ({}, dict(workers=1), "DATALOADER.NUM_WORKERS was 0 and is 1"),
    ({}, dict(grouping=False), "aspect-ratio grouping was True and is False"),
    (dict(grouping=False), {}, "aspect-ratio grouping was False and is True"),
    ({}, dict(number=4), "number of training images was 10 and is 4"),
    ({}, dict(mapper=other_mapper), "mapper was mapper and is other_mapper"),
    ({}, dict(sampler=OTHER), "sampler was TrainingSampler and is RepeatFactorTrainingSampler"),
]


@pytest.mark.parametrize(("old", "new", "told"), CHANGES)
def test_goes_on_behind_what_was_drawn_if_something_changed(old, new, told, caplog):
    saved = states(ResumableLoader(stock(**{"batch": 6, **old})), 3)  # 18 images; and 5 that wait, if grouped
    made = {"number": 10, "batch": 6, **new}
    again = ResumableLoader(stock(**made))
    (warning,) = resumed(again, saved, 3, caplog)
    assert warning.startswith(told) and "the data order of this run is another one from here on" in warning
    number, batch = made["number"], made["batch"]
    found = ids(drawn(again, 3 * number // batch))  # neither hangs nor fails
    assert [len(x) for x in found] == [batch] * (3 * number // batch)
    if not {"sampler", "workers"} & new.keys():
        order = order_of(TrainingSampler(number, seed=4), 18 if old else 23, 4 * batch)  # of the old sampler's seed
        assert set(found[0]) <= set(order) and (made.get("grouping", True) or found[0] == order[:batch])


def test_a_checkpoint_that_does_not_say_what_its_order_was_of(caplog):
    old = states(ResumableLoader(stock(batch=6, grouping=False)), 3)
    del old[0]["loaders"][0]["made_of"]
    for saved, word, kind in ((old, "of an older version", "plain"), (None, "no random states", "repeat")):
        again = ResumableLoader(stock(batch=6, grouping=False, sampler=SAMPLERS[kind]()))
        assert word in resumed(again, saved, 3, caplog)[0]
        assert ids(drawn(again, 1))[0] == order_of(SAMPLERS[kind](), 18, 6)


@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 2)])
def test_another_number_of_processes(old, new, caplog, monkeypatch):
    def of_rank(rank, world):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world)
        monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: world)
        return ResumableLoader(stock(batch=4, grouping=False))

    saved = [states(of_rank(rank, old), 6)[0] for rank in range(old)]  # 24 images of 10
    first = []
    for rank in range(new):
        again = of_rank(rank, new)
        (warning,) = resumed(again, saved, 6, caplog)
        assert f"number of processes was {old} and is {new}" in warning
        first.append(ids(drawn(again, 2)))
    mixed = list(itertools.chain(*zip(*(itertools.chain(*batches) for batches in first), strict=True)))
    assert mixed == order_of(TrainingSampler(10, seed=4), 24, 8)


def test_a_run_that_started_over_is_resumed_exactly(caplog):
    saved = states(ResumableLoader(stock(batch=6)), 4)
    second = ResumableLoader(stock(batch=2))
    resumed(second, saved, 4, caplog)
    saved = states(second, 5)
    third = ResumableLoader(stock(batch=2))
    assert resumed(third, saved, 9, caplog) == []
    reference = ResumableLoader(stock(batch=2))
    reference.stream.skipped = second.stream.skipped
    assert ids(drawn(third, 6)) == ids(drawn(reference, 11))[5:]


class Mapper:
    def __init__(self, generator=None, unusable=()):
        self.augmentations, self.unusable = [SimpleNamespace(generator=generator)], unusable

    def __call__(self, record):
        return None if record["image_id"] in self.unusable else record


@pytest.mark.parametrize("generator", [np.random.default_rng(3), random.Random(3), None])
def test_a_generator_that_no_checkpoint_holds_is_named(generator, caplog):
    resumable(stock(mapper=Mapper(generator)))
    named = f"draws from a random generator of its own ({type(generator).__name__}), which no checkpoint holds"
    assert (named in caplog.text) == (generator is not None)


@pytest.mark.parametrize("unusable", [(), (3, 4)])
def test_a_mapper_that_gives_none_is_named_once(unusable, caplog):
    loader = resumable(stock(mapper=Mapper(unusable=unusable)))
    drawn(loader, 8)
    assert caplog.text.count("The mapper returns None for some images") == bool(unusable)


@pytest.mark.parametrize(
    "loader",
    [
        stock(collate_fn=list),
        stock(grouping=False, collate_fn=list),
        stock(sampler=type("OwnSampler", (TrainingSampler,), {})(10)),
        stock(seed=3),
        DataLoader(images(4), batch_size=2),
        [[1], [2]],
    ],
)
def test_a_loader_of_the_users_own_is_left_alone(loader, caplog):
    assert resumable(loader) is loader
    assert "The data order of a resumed run will start over: the training loader" in caplog.text
