"""The position of the training loader: samples delivered by each worker, its random state before the last one, and the
samples in the aspect-ratio buckets."""

import dataclasses
import functools
import hashlib
import itertools
import logging
import operator
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.common import AspectRatioGroupedDataset, DatasetFromList, MapDataset, ToIterableDataset
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from repr_det.network.state import generators_in, random_state, set_random_state

logger = logging.getLogger("repr_det.resume")
SAMPLERS = (TrainingSampler, RandomSubsetTrainingSampler, RepeatFactorTrainingSampler)
_DRAWN = ("_seed", "_indexes")  # what a sampler draws for itself
_OPTIONS = (  # of a DataLoader
    "batch_size drop_last num_workers worker_init_fn timeout prefetch_factor persistent_workers multiprocessing_context"
).split()
_LOOKED_AT = 64  # samples in the digest of a data set, evenly spread


@dataclasses.dataclass
class _Marked:
    """A sample and its origin: (stream, number in that stream, index, random state before)."""

    sample: Any
    origin: tuple

    def __getitem__(self, key: str) -> Any:
        """For aspect-ratio grouping."""
        return self.sample[key]


class _Stream(IterableDataset):
    """ToIterableDataset that marks every sample with its origin and can start in the middle.

    A stream is the share of the sampler's indices that one loader worker is given.
    """

    def __init__(self, source: ToIterableDataset) -> None:
        self.dataset, self.sampler = source.dataset, source.sampler
        self.chunk = source.shard_chunk_size if source.shard_sampler else 0
        self.skipped = 0  # indices of the sampler before the beginning of all streams
        self.consumed: dict[int, tuple[int, dict]] = {}  # stream -> samples delivered, random state before the last
        self.first = 0  # the stream of worker 0, which torch asks first

    def __iter__(self) -> Iterator[_Marked]:
        info = get_worker_info()
        workers = 1 if info is None else info.num_workers
        mine = 0 if info is None else (info.id + self.first) % workers
        done, state = self.consumed.get(mine, (0, None))
        number, warned = -1, False
        for position, index in enumerate(itertools.islice(self.sampler, self.skipped, None)):
            if self.chunk and (position // self.chunk) % workers != mine:
                continue
            number += 1
            if number < done:
                if number == done - 1 and info is not None:
                    # Augmenting the last delivered sample leads to the random state before the next.
                    set_random_state(state)
                    self.dataset[index]
                continue
            before = random_state()
            yield _Marked(self.dataset[index], (mine, number, index, before))
            usable = getattr(self.dataset, "_fallback_candidates", ())
            if 0 < len(usable) < len(self.dataset) and not warned:
                warned = True
                logger.warning("The mapper returns None for some images: a resumed run sees others than this one")


class ResumableLoader:
    """A loader of ``build_detection_train_loader`` whose position can be saved and resumed.

    Raises:
        TypeError: something but the map-style data set and its mapper is not Detectron2's own.
    """

    def __init__(self, loader: Any) -> None:
        grouped = type(loader) is AspectRatioGroupedDataset
        inner = loader.dataset if grouped else loader
        _check_understood(inner, grouped)
        self.num_workers: int = inner.num_workers
        self.batch_size: int = loader.batch_size  # of this process
        self.dataset = self.stream = _Stream(inner.dataset)  # others look for the data set in .dataset
        options = {name: getattr(inner, name) for name in _OPTIONS}
        self._source: Any = DataLoader(self.stream, collate_fn=trivial_batch_collator, **options)
        self._grouping = AspectRatioGroupedDataset(None, loader.batch_size) if grouped else None
        self._buckets: list[list[_Marked]] = [] if self._grouping is None else self._grouping._buckets
        self._consumed: dict[int, tuple[int, dict]] = {}

    def start(self) -> None:
        """Makes torch's iterator, which draws and forks, before a resumed run puts the random state back."""
        if self._consumed:
            self._source = iter(self._source)

    def __iter__(self) -> Iterator[list]:
        batches: Iterable = self._delivered()
        if self._grouping is not None:
            self._grouping.dataset = itertools.chain.from_iterable(batches)
            batches = self._grouping
        for batch in batches:
            yield [marked.sample for marked in batch]

    def _delivered(self) -> Iterator[list[_Marked]]:
        """Counts the samples that workers hand over, one at a time if grouped, else a batch."""
        for delivery in self._source:
            for marked in delivery:
                stream, number, _, before = marked.origin
                self._consumed[stream] = (number + 1, before)
            yield delivery

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that give a saved position its meaning, by names that a user knows."""
        sampler, dataset = self.stream.sampler, self.stream.dataset
        about = {"data set's class": type(dataset).__qualname__}
        if type(dataset) is MapDataset:
            about = dict(_described("mapper", dataset._map_func))
        return {
            "number of processes": comm.get_world_size(),
            "DATALOADER.NUM_WORKERS": self.num_workers,
            "number of images per process and batch": self.batch_size,
            "aspect-ratio grouping": self._grouping is not None,
            "sampler": type(sampler).__name__,
            "number of training images": len(dataset),
            "sampler's settings": _settings_of(sampler),
            "digest of the training images": _digest(dataset),
            **about,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "made_of": self.fingerprint,
            "sampler": {name: value for name, value in vars(self.stream.sampler).items() if name.startswith(_DRAWN)},
            "skipped": self.stream.skipped,
            "consumed": {stream: list(done) for stream, done in self._consumed.items()},
            "buckets": [[list(marked.origin) for marked in bucket] for bucket in self._buckets],
        }

    def changes(self, state: dict[str, Any]) -> list[str]:
        """Differences from the loader of ``state``, as "x was 1 and is 2"; [] if it can resume."""
        own, theirs = self.fingerprint, state.get("made_of")
        if theirs is None:
            return ["the checkpoint of an older version does not say what its data order was made of"]
        changed = [name for name, value in theirs.items() if value != own.get(name)]
        return [f"{name} was {theirs[name]} and is {own.get(name)}" for name in changed]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes after the last batch that the saved loader gave; before the first ``iter``."""
        self._load_sampler(state)
        self.stream.skipped = state.get("skipped", 0)
        self._consumed = {stream: tuple(done) for stream, done in state["consumed"].items()}
        self.stream.consumed = dict(self._consumed)
        deliveries = sum(count for count, _ in self._consumed.values()) // self._source.batch_size
        self.stream.first = deliveries % max(1, self.num_workers)
        for bucket, origins in zip(self._buckets, state["buckets"], strict=True):
            for stream, number, index, before in origins:
                set_random_state(before)
                bucket.append(_Marked(self.stream.dataset[index], (stream, number, index, before)))

    def skip(self, states: list[dict[str, Any]], iteration: int) -> None:
        """Skips as many images as all processes had drawn by ``iteration``: ``states`` tell the number, else this batch
        size does. A saved sampler of the same kind gives the order."""
        drawn = iteration * self.batch_size * comm.get_world_size()
        if states:
            drawn = sum(s.get("skipped", 0) + sum(count for count, _ in s["consumed"].values()) for s in states)
            self._load_sampler(states[0])
        self.stream.skipped = len(range(comm.get_rank(), drawn, comm.get_world_size()))

    def _load_sampler(self, state: dict[str, Any]) -> None:
        """Sets the seed of a sampler of the same kind; with the same settings also the images of its subset."""
        own = self.fingerprint
        theirs = own | state.get("made_of", {})
        if theirs["sampler"] != own["sampler"]:
            return
        same_images = theirs["sampler's settings"] == own["sampler's settings"]
        for name, value in state["sampler"].items():
            if hasattr(self.stream.sampler, name) and (same_images or name == "_seed"):
                setattr(self.stream.sampler, name, value)


def resumable(loader: Iterable) -> Iterable:
    """``loader`` as a ResumableLoader if it is Detectron2's, else itself with a warning."""
    try:
        resumed = ResumableLoader(loader)
    except TypeError as error:
        logger.warning("The data order of a resumed run will start over: the training loader %s", error)
        return loader
    mapper = getattr(resumed.stream.dataset, "_map_func", None)
    if kinds := {type(generator).__name__ for generator in generators_in(mapper)}:
        logger.warning(
            "The mapper draws from a random generator of its own (%s), which no checkpoint holds: draw from np.random",
            ", ".join(sorted(kinds)),
        )
    return resumed


def _check_understood(inner: Any, grouped: bool) -> None:
    def need(condition: bool, reason: str) -> None:
        if not condition:
            raise TypeError(reason)

    need(type(inner) is DataLoader, f"is not Detectron2's alone ({type(inner).__name__})")
    collate = inner.collate_fn
    takes_one = type(collate) is operator.itemgetter and repr(collate) == repr(operator.itemgetter(0))
    need(takes_one and inner.batch_size == 1 if grouped else collate is trivial_batch_collator, "has a collate_fn")
    need(inner.worker_init_fn is worker_init_reset_seed, "has a worker_init_fn")
    need(inner.generator is None, "has a generator")
    need(not inner.pin_memory, "pins memory")
    need(getattr(inner, "in_order", True), "gives batches out of order")
    source = inner.dataset
    need(type(source) is ToIterableDataset, f"reads a {type(source).__name__}")
    need(type(source.sampler) in SAMPLERS, f"has a {type(source.sampler).__name__}")


def _settings_of(sampler: Any) -> str:
    settings = {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest()[:12] if torch.is_tensor(value) else value
        for name, value in sorted(vars(sampler).items())
        if not name.startswith((*_DRAWN, "_rank", "_world_size"))
    }
    return ", ".join(f"{name.lstrip('_')} {value}" for name, value in settings.items())


def _digest(dataset: Any) -> str | None:
    """A digest of names, sizes and box counts of some images; None if that is not cheap."""
    entries = getattr(dataset, "_dataset", None)
    if type(dataset) is not MapDataset or type(entries) is not DatasetFromList:
        return None
    number, digest = min(_LOOKED_AT, len(entries)), hashlib.sha256()
    for i in range(number):
        entry = entries[i * len(entries) // number]
        known = entry if isinstance(entry, dict) else {}
        size = [known.get(key) for key in ("image_id", "height", "width")]
        name = os.path.basename(str(known.get("file_name")))
        digest.update(repr((name, size, len(known.get("annotations", ())))).encode())
    return digest.hexdigest()[:12]


def _described(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of a mapper and its attributes, without addresses in memory."""
    value = getattr(value, "_obj", value)  # Detectron2's PicklableWrapper
    try:
        text = repr(value)
    except Exception:  # Detectron2 cannot describe every augmentation
        text = ""
    if isinstance(value, (list, tuple)) or (text and " at 0x" not in text):
        yield name, text if " at 0x" not in text else type(value).__qualname__
        return
    yield name, getattr(value, "__qualname__", type(value).__qualname__)
    if depth < 3:
        for key, inner in sorted(getattr(value, "__dict__", {}).items()):
            yield from _described(f"{name}'s {key}", inner, depth + 1)
