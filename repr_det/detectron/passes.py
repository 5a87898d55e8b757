"""Extra passes over the training data of a Detectron2 trainer, for criteria, calibration and the proof."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

from detectron2.data import MapDataset, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from repr_det.method.errors import UserError
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import preserved_random_state

CALIBRATION_IMAGES = 8


def training_passes(
    model: nn.Module, trainer: Any, seed: int, images_per_batch: int | None, grouped: bool
) -> TrainingPasses:
    """Extra passes, from a loader of their own whose order depends on seed and cycle only.

    The data set and its mapper are those of the trainer's loader if that is Detectron2's. Else the trainer's
    ``build_train_loader`` makes a loader, or the trainer's own is iterated again, from its beginning.

    Args:
        images_per_batch: over all ranks; None takes that of the trainer's loader.
        grouped: whether images of one orientation are together in a batch.
    """
    inner = getattr(trainer, "_trainer", trainer)

    def batches(number: int, cycle: int) -> Iterable[list[dict]]:
        mixed = max(seed, 0) * 1_000_003 + cycle * 1009
        own = getattr(inner, "data_loader", None)
        dataset = map_dataset(own)
        with preserved_random_state(own):
            seed_all_rng(mixed + comm.get_rank())
            if dataset is not None:
                loader: Iterable = build_detection_train_loader(
                    dataset=dataset,
                    mapper=None,
                    sampler=TrainingSampler(len(dataset), seed=mixed),
                    total_batch_size=images_per_batch or batch_size_of(own) or 16,
                    aspect_ratio_grouping=grouped,
                )
            else:
                loader = _own_loader(trainer, inner)
            return list(itertools.islice(loader, number))

    def loss(batch: list[dict]) -> Tensor:
        # Detectron2's models log scalars and images as they run; those of extra passes are not the training's.
        try:
            with EventStorage(0):
                return sum(model(batch).values())
        except FloatingPointError as error:  # Detectron2's, of boxes that are not finite
            raise UserError(
                f"RePr, on the training batches that a transition looks at: {' '.join(str(error).split())} Lower the "
                "learning rate or clip gradients, and resume from a checkpoint before that"
            ) from error

    passes = TrainingPasses(model, batches, loss)
    if images := images_per_batch or batch_size_of(getattr(inner, "data_loader", None)):
        passes.calibration_batches = calibration_batches(images)
    return passes


def map_dataset(loader: Any) -> MapDataset | None:
    """The map-style data set inside a loader that ``build_detection_train_loader`` made, or None."""
    while loader is not None and not isinstance(loader, MapDataset):
        loader = getattr(loader, "dataset", None)
    return loader


def epochs_of(trainer: Any, images_per_batch: int | None) -> float | None:
    """Returns the epochs of a whole training; None if its loader does not tell its images."""
    loader = getattr(getattr(trainer, "_trainer", trainer), "data_loader", None)
    dataset, images = map_dataset(loader), images_per_batch or batch_size_of(loader)
    return None if not dataset or images is None else trainer.max_iter * images / len(dataset)


def calibration_batches(images_per_batch: int) -> int:
    """Batches, each of ``images_per_batch`` over all ranks, that a calibration of FrozenBN looks at.

    Eight images give a channel's standard deviation to about 3 %.
    """
    return math.ceil(CALIBRATION_IMAGES / images_per_batch)


def batch_size_of(loader: Any) -> int | None:
    """Images of a batch over all ranks; None where the loader does not say."""
    while loader is not None:
        if isinstance(size := getattr(loader, "batch_size", None), int):
            return size * comm.get_world_size()
        loader = getattr(loader, "dataset", None)
    return None


def _own_loader(trainer: Any, inner: Any) -> Iterable:
    build = getattr(trainer, "build_train_loader", None)
    if build is not None:
        cfg = trainer.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        return build(cfg)
    if iter(inner.data_loader) is inner.data_loader:
        raise UserError(
            "RePr: transitions look at training batches, and this trainer's data loader is an iterator, which "
            "training would miss them from: give one that can be iterated again, such as a DataLoader or a list"
        )
    return inner.data_loader
