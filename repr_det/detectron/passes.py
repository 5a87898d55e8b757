"""Extra passes over the training data of a Detectron2 trainer."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.data import MapDataset, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from repr_det.detectron.config import changed
from repr_det.method.errors import UserError
from repr_det.method.passes import TrainingPasses, afresh, parts_of
from repr_det.network.state import preserved_random_state, seed_of

CALIBRATION_IMAGES = 8  # give a channel's standard deviation to about 3 %


def training_passes(model: nn.Module, trainer: Any, seed: int, images_per_batch: int | None) -> TrainingPasses:
    """Extra passes, whose order depends on seed and cycle only.

    They read data set and mapper of the trainer's loader if that is Detectron2's, and group by shape if it does. Else
    ``build_train_loader`` makes another, or the loader is iterated again.

    Args:
        images_per_batch: over all ranks; None takes the loader's.
    """

    def batches(number: int, cycle: int) -> Iterable[list[dict]]:
        own = _loader_of(trainer)
        dataset = map_dataset(own)
        with preserved_random_state(own, seed=seed_of(seed, cycle, comm.get_rank())):
            if dataset is not None:
                loader: Iterable = build_detection_train_loader(
                    dataset,
                    mapper=None,
                    sampler=TrainingSampler(len(dataset), seed=seed_of(seed, cycle)),
                    total_batch_size=images_per_batch or batch_size_of(own) or 16,
                    aspect_ratio_grouping=bool(getattr(own, "_buckets", ())),
                )
            else:
                loader = _own_loader(trainer, own)
            return list(itertools.islice(loader, number))

    def loss(batch: list[dict]) -> Tensor:
        try:
            with EventStorage(0):  # what models log here is not the training's
                found = model(batch)
                return found if torch.is_tensor(found) else sum(found.values())
        except FloatingPointError as error:  # boxes that are not finite
            text = " ".join(str(error).split())
            raise UserError(
                f"RePr, in a pass of a transition: {text} Lower the learning rate or clip gradients"
            ) from error

    passes = TrainingPasses(model, batches, loss)
    if images := images_per_batch or batch_size_of(_loader_of(trainer)):
        passes.calibration_batches = math.ceil(CALIBRATION_IMAGES / images)
    return passes


def map_dataset(loader: Any) -> MapDataset | None:
    """The map-style data set inside a loader of ``build_detection_train_loader``, or None."""
    return next((part for part in parts_of(loader) if isinstance(part, MapDataset)), None)


def epochs_of(trainer: Any, images_per_batch: int | None) -> float | None:
    """The epochs of a whole training; None if its loader does not tell."""
    loader = _loader_of(trainer)
    dataset, images = map_dataset(loader), images_per_batch or batch_size_of(loader)
    return None if not dataset or images is None else trainer.max_iter * images / len(dataset)


def batch_size_of(loader: Any) -> int | None:
    """Images of a batch over all ranks; None if the loader does not tell."""
    sizes = (getattr(part, "batch_size", None) for part in parts_of(loader))
    return next((size * comm.get_world_size() for size in sizes if isinstance(size, int)), None)


def _loader_of(trainer: Any) -> Any:
    return getattr(getattr(trainer, "_trainer", trainer), "data_loader", None)


def _own_loader(trainer: Any, own: Any) -> Iterable:
    build = getattr(trainer, "build_train_loader", None)
    if build is not None:
        return build(changed(trainer.cfg, "DATALOADER.NUM_WORKERS", 0))
    return afresh(own, "RePr: transitions look at training batches, and this trainer's data loader")
