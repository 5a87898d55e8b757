"""Exact resume: a run that was killed and resumed ends with the weights of the run that was not.

Stock Detectron2 restores model, optimizer and iteration, but starts the data order over and forgets every random state.
Here a checkpoint also holds the random states of all ranks and the position of the training data stream: how many
samples each loader worker has delivered, its random state before the last of them, and the samples that wait in the
aspect-ratio buckets. An undisturbed run sees exactly stock Detectron2's batches.

The same number of ranks and loader workers is needed; otherwise the data order starts over, with a warning.
"""

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter
from torch.utils.data import IterableDataset, get_worker_info

from repr_det.method.errors import UserError
from repr_det.method.passes import random_state, set_random_state
from repr_det.runs.files import METRICS_FILE, last_logged, truncate_log, write_atomically
from repr_det.runs.safe_pickle import load_checkpoint

logger = logging.getLogger("repr_det.resume")
_ORIGIN = "repr_det/origin"  # key of a sample: (stream, number in that stream, index, random state before)
_SAVING = ".saving-"
_WINDOW = 20  # Detectron2's writers smooth over so many iterations


class AtomicCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer whose files are whole or absent (written beside their place and renamed into it), and which
    executes nothing that a file contains: torch files are loaded as weights only, pickles by a restricted unpickler."""

    _resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        """As DetectionCheckpointer.save; ``last_checkpoint`` changes only once the file is on the disk."""
        if not self.save_dir or not self.save_to_disk:
            return
        final = self.save_dir
        try:
            with tempfile.TemporaryDirectory(dir=final, prefix=_SAVING) as self.save_dir:
                self._final = final
                super().save(name, **kwargs)  # ends in tag_last_checkpoint
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # where torch writes its files
                raise
            raise UserError(
                f"the checkpoint {name} could not be written to {final}: {_reason(error)}; the checkpoints "
                "before it are untouched: free space, then --resume"
            ) from error
        finally:
            self.save_dir = final

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As in Detectron2; a run that is resumed must find every weight of its model."""
        self._resuming = resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        data = load_checkpoint(filename)
        if "model" in data and "__author__" in data:
            return data
        weights = data.get("blobs", data)
        weights = {name: value for name, value in weights.items() if not name.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f: str) -> dict[str, Any]:
        return load_checkpoint(f)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        found = super()._load_model(checkpoint)
        parameters = {name for name, _ in self.model.named_parameters()}
        unfit = [n for n in (*found.missing_keys, *(n for n, *_ in found.incorrect_shapes)) if n in parameters]
        if unfit and (self._resuming or len(unfit) == len(parameters)):
            most = "all weights" if self._resuming else "any weight"
            raise UserError(
                f"the checkpoint does not hold {most} of this model: {unfit[0]} is missing or of another shape "
                f"({len(unfit)} of {len(parameters)}); use the MODEL of the run that wrote it"
            )
        return found

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        written = os.path.join(self.save_dir, last_filename_basename)
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.replace(written, os.path.join(self._final, last_filename_basename))
        write_atomically(os.path.join(self._final, "last_checkpoint"), last_filename_basename)


def _reason(error: BaseException) -> str:
    """What the system said where torch hides it behind an error of its own."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0]


def remove_unfinished_saves(folder: str) -> None:
    """Deletes what a killed ``AtomicCheckpointer.save`` left behind."""
    for leftover in Path(folder).glob(f"{_SAVING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


class _Stream(IterableDataset):
    """ToIterableDataset that marks every sample with its origin and can start in the middle.

    A stream is the share of the sampler's indices that one loader worker is given (all of them without workers).

    Attributes:
        consumed: stream -> samples delivered so far, random state before the last of them.
        first: the stream of worker 0; torch asks its workers in turn, beginning with that one.
    """

    def __init__(self, source: ToIterableDataset) -> None:
        self.dataset, self.sampler = source.dataset, source.sampler
        self.chunk = source.shard_chunk_size if source.shard_sampler else 0
        self.consumed: dict[int, tuple[int, dict]] = {}
        self.first = 0

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        workers = 1 if info is None else info.num_workers
        mine = 0 if info is None else (info.id + self.first) % workers
        done, state = self.consumed.get(mine, (0, None))
        number = -1
        for position, index in enumerate(self.sampler):
            if self.chunk and (position // self.chunk) % workers != mine:
                continue
            number += 1
            if number < done:
                if number == done - 1 and info is not None:
                    # In a worker the augmentation of the last delivered sample leads to the state before the next one;
                    # in the main process the checkpoint's own random state is that.
                    set_random_state(state)
                    self.dataset[index]
                continue
            before = random_state()
            sample = self.dataset[index]
            sample[_ORIGIN] = (mine, number, index, before)
            yield sample


class ResumableLoader:
    """A loader of ``build_detection_train_loader`` whose position can be saved and taken up again.

    Args:
        loader: made from a map-style data set by Detectron2.
        cfg: gives IMS_PER_BATCH and ASPECT_RATIO_GROUPING.

    Raises:
        TypeError: the loader is of another making.
    """

    def __init__(self, loader: Any, cfg: CfgNode) -> None:
        source, self.num_workers = loader, 0
        while not isinstance(source, ToIterableDataset):
            self.num_workers = getattr(source, "num_workers", self.num_workers)
            if (source := getattr(source, "dataset", None)) is None:
                raise TypeError(f"{type(loader).__name__} was not made by build_detection_train_loader")
        self.stream = _Stream(source)
        self.loader = build_detection_train_loader(
            dataset=self.stream,
            mapper=None,
            sampler=None,
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            num_workers=self.num_workers,
        )
        self.dataset = self.stream  # so that others find the map-style data set as in Detectron2's own loaders
        grouped = isinstance(self.loader, AspectRatioGroupedDataset)
        self._per_delivery = 1 if grouped else self.loader.batch_size  # samples that a worker hands over at a time
        self._last: dict[int, tuple] = {}

    @property
    def was_read(self) -> bool:
        """Whether a batch has been taken from it, by this run or by the one that it continues."""
        return bool(self._last)

    def start(self) -> None:
        """Makes torch's iterator now instead of with the first batch: it draws from torch's random state and forks the
        workers, which a resumed run has to do before its random state is put back."""
        if isinstance(self.loader, AspectRatioGroupedDataset):
            self.loader.dataset = iter(self.loader.dataset)
        else:
            self.loader = iter(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self.loader:
            for sample in batch:
                self._note(sample.pop(_ORIGIN))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Loads under ``torch.load(weights_only=True)``."""
        last = dict(self._last)
        buckets = [[sample[_ORIGIN] for sample in bucket] for bucket in self._buckets()]
        for stream, number, _, before in itertools.chain.from_iterable(buckets):
            if number >= last.get(stream, (-1, None))[0]:
                last[stream] = (number, before)
        return {
            "num_workers": self.num_workers,
            "sampler": self._sampler_seeds(),
            "consumed": {stream: [number + 1, before] for stream, (number, before) in last.items()},
            "buckets": [[list(origin) for origin in bucket] for bucket in buckets],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch that the saved loader gave out; before the first ``iter``."""
        if state["num_workers"] != self.num_workers:
            logger.warning(
                "DATALOADER.NUM_WORKERS was %d and is %d: the data order of this run starts over",
                state["num_workers"],
                self.num_workers,
            )
            return
        vars(self.stream.sampler).update(state["sampler"])
        self.stream.consumed = {stream: tuple(done) for stream, done in state["consumed"].items()}
        deliveries = sum(count for count, _ in state["consumed"].values()) // self._per_delivery
        self.stream.first = deliveries % max(1, self.num_workers)
        self._last = {stream: (number - 1, before) for stream, (number, before) in state["consumed"].items()}
        for bucket, origins in zip(self._buckets(), state["buckets"], strict=True):
            for stream, number, index, before in origins:
                set_random_state(before)
                sample = self.stream.dataset[index]
                sample[_ORIGIN] = (stream, number, index, before)
                bucket.append(sample)

    def _note(self, origin: tuple) -> None:
        stream, number, _, before = origin
        if number >= self._last.get(stream, (-1, None))[0]:
            self._last[stream] = (number, before)

    def _buckets(self) -> list[list[dict]]:
        return self.loader._buckets if isinstance(self.loader, AspectRatioGroupedDataset) else []

    def _sampler_seeds(self) -> dict[str, int]:
        return {k: v for k, v in vars(self.stream.sampler).items() if k.startswith("_seed")}


class ExactResume(HookBase):
    """Saves and restores what stock checkpoints lack. Belongs right before the PeriodicCheckpointer.

    Where a checkpoint and an evaluation fall on the same iteration the checkpoint comes first, so a resumed run makes
    that evaluation again: its result is not lost, and it draws the random numbers that it drew before.

    The scalars of the last iterations come back as well, so that metrics.json goes on as if nothing had happened: what
    was evaluated before the checkpoint and not yet written is written later.

    Args:
        loaders: those that draw training images: the training loader, and others that hooks read while training.
        checkpoint_period: SOLVER.CHECKPOINT_PERIOD.
        eval_period: TEST.EVAL_PERIOD.
        folder: OUTPUT_DIR, whose logs forget what lies after the checkpoint.
    """

    def __init__(
        self, loaders: Sequence[ResumableLoader | Any], checkpoint_period: int, eval_period: int, folder: str
    ) -> None:
        self.loaders = loaders
        self.checkpoint_period = checkpoint_period
        self.eval_period = eval_period
        self.folder = folder
        self._saved: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None

    def before_train(self) -> None:
        if comm.is_main_process():
            truncate_log(os.path.join(self.folder, METRICS_FILE), self.trainer.start_iter)
        if self._loaded is None:
            return
        ranks = self._loaded["ranks"]
        of_this_iteration = self._loaded["iteration"] == self.trainer.start_iter - 1
        if of_this_iteration:
            self._bring_back_scalars(self._loaded["scalars"])
        if not of_this_iteration or len(ranks) != comm.get_world_size():
            logger.warning(
                "The random states in this checkpoint are those after iteration %d of %d process(es): the data order "
                "of this run starts over",
                self._loaded["iteration"],
                len(ranks),
            )
            self._loaded = None
            return
        # A loader that the run did not have before, for TEST.PRECISE_BN was switched on, begins at its beginning.
        for loader, state in zip(self.loaders, ranks[comm.get_rank()]["loaders"], strict=False):
            if state is not None and isinstance(loader, ResumableLoader):
                loader.load_state_dict(state)

    def before_step(self) -> None:
        if self._loaded is None:
            return
        for loader in self.loaders:
            if isinstance(loader, ResumableLoader) and loader.was_read:
                loader.start()
        set_random_state(self._loaded["ranks"][comm.get_rank()]["random"])
        self._loaded = None
        iteration = self.trainer.iter
        if self.eval_period > 0 and iteration % self.eval_period == 0:
            evaluation = next((h for h in self.trainer._hooks if isinstance(h, hooks.EvalHook)), None)
            if evaluation is not None:
                self.trainer.storage.iter = iteration - 1
                evaluation._do_eval()
                self.trainer.storage.iter = iteration
        self._write_what_was_due()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.checkpoint_period == 0 or done >= self.trainer.max_iter:
            self.collect()

    def collect(self) -> None:
        """What a checkpoint of this moment needs; on every rank, and before evaluation."""
        loaders = [x.state_dict() if isinstance(x, ResumableLoader) else None for x in self.loaders]
        ranks = comm.gather({"random": random_state(), "loaders": loaders})
        self._saved = {"iteration": self.trainer.iter, "ranks": ranks, "scalars": _scalars(self.trainer.storage)}

    def _bring_back_scalars(self, scalars: dict[str, list]) -> None:
        storage, now = self.trainer.storage, self.trainer.storage.iter
        for name, (smoothed, values) in scalars.items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value, smoothing_hint=smoothed)
        storage.iter = now
        written = last_logged(os.path.join(self.folder, METRICS_FILE))
        for _, writer in self._json_writers():
            writer._last_write = written
        if self.trainer.start_iter == self.trainer.max_iter:
            self._write_what_was_due()

    def _write_what_was_due(self) -> None:
        """The run may have died between the checkpoint and the writers, which come after it."""
        start = self.trainer.start_iter
        for period, writer in self._json_writers():
            if start % period == 0 or start == self.trainer.max_iter:
                writer.write()

    def _json_writers(self) -> list[tuple[int, JSONWriter]]:
        periodic = [hook for hook in self.trainer._hooks if isinstance(hook, hooks.PeriodicWriter)]
        return [(hook._period, x) for hook in periodic for x in hook._writers if isinstance(x, JSONWriter)]

    def state_dict(self) -> dict[str, Any]:
        return self._saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = self._saved = state


def _scalars(storage: EventStorage) -> dict[str, list]:
    """Name -> [whether it is smoothed, the last values with their iterations], as many as the writers look at."""
    hints = storage.smoothing_hints()
    return {
        name: [hints[name], [[value, int(iteration)] for value, iteration in history.values()[-_WINDOW:]]]
        for name, history in storage.histories().items()
        if name != "time"  # Detectron2's timer does not count the first iterations of a run, resumed or not
    }


def resumable(loader: Iterable, cfg: CfgNode) -> Iterable:
    """``loader`` as a ResumableLoader where that is possible, else itself with a warning."""
    try:
        return ResumableLoader(loader, cfg)
    except TypeError as error:
        logger.warning("The data order of a resumed run will start over: %s", error)
        return loader


def check_last_checkpoint(folder: str) -> None:
    """Raises UserError where ``last_checkpoint`` in ``folder`` names a file that is not there or cannot be read."""
    tag = Path(folder) / "last_checkpoint"
    if not tag.exists():
        return
    name = ""
    with suppress(UnicodeDecodeError):
        name = tag.read_text(encoding="utf-8").strip()
    if not name or not (Path(folder) / name).is_file():
        raise UserError(
            f"{tag} names {name!r}, which is not there: write the name of a checkpoint in that folder into it"
        )
    try:
        load_checkpoint(Path(folder) / name)
    except UserError as error:
        raise UserError(f"{error}; to resume from an older one write its name into {tag}") from error
