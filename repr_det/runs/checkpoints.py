"""Checkpoints of a run."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine.train_loop import TrainerBase

from repr_det.method.errors import UserError
from repr_det.runs.files import FINAL_CHECKPOINT, advice_for, cause_of, replacing, write_atomically
from repr_det.runs.safe_pickle import load_checkpoint

logger = logging.getLogger("repr_det.resume")
_TAG = "last_checkpoint"


class AtomicCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer whose files are whole or absent, and that runs no code of a file.

    Without ``last_checkpoint`` it takes the newest checkpoint of the folder. ``unfit`` are the parameters that the file
    loaded last lacked or had in another shape. ``thing_classes``, in the order of the outputs, go into every file."""

    _resuming = False
    unfit: Sequence[str] = ()
    thing_classes: Sequence[str] = ()

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves as Detectron2 does; ``last_checkpoint`` changes once the file is on the disk."""
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir) / f"{name}.pth"
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with replacing(path, "wb") as file:
                named = {"model": self.model.state_dict(), "thing_classes": list(self.thing_classes)}
                torch.save(named | states | kwargs, file)
            write_atomically(path.with_name(_TAG), path.name)
        except (OSError, RuntimeError) as error:
            cause = cause_of(error)
            if not isinstance(cause, OSError):
                raise
            raise UserError(
                f"the checkpoint {name} could not be written to {self.save_dir}: {str(cause).splitlines()[0]}; the "
                f"checkpoints before it are untouched: {advice_for(error) or 'see to the cause'}, then --resume"
            ) from error

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        return str(find_checkpoint(self.save_dir) or "") if self.save_dir else ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads as Detectron2 does; a resumed run must find every weight of its model."""
        self._resuming = resume and self.has_checkpoint()
        if self._resuming and not (Path(self.save_dir) / _TAG).exists():
            newest = self.get_checkpoint_file()
            logger.warning("There is no %s: resuming from the newest checkpoint, %s", _TAG, newest)
        return super().resume_or_load(path, resume=resume)

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Reads as Detectron2 does, which would run what a .pkl or .pyth names."""
        if not filename.endswith((".pkl", ".pyth")):
            return super()._load_file(filename)
        data = load_checkpoint(filename)
        if filename.endswith(".pyth"):
            weights, author, left_out = data.get("model_state"), "pycls", "num_batches_tracked"
            if not isinstance(weights, dict):
                raise UserError(f"{filename} has no 'model_state', where pycls (.pyth) keeps weights")
        elif "model" in data and "__author__" in data:
            return data
        else:
            weights, author, left_out = data.get("blobs", data), "Caffe2", "_momentum"
        weights = {name: value for name, value in weights.items() if not name.endswith(left_out)}
        return {"model": weights, "__author__": author, "matching_heuristics": True}

    def _torch_load(self, f: str) -> dict[str, Any]:
        try:
            return load_checkpoint(f)
        except UserError as error:
            tag = Path(self.save_dir) / _TAG
            if not self._resuming or Path(f).parent != tag.parent:
                raise
            raise UserError(f"{error}; to resume from an older one write its name into {tag}") from error

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self._resuming and "trainer" in self.checkpointables:
            checkpoint.setdefault("trainer", {})  # which Trainer refuses
        found = super()._load_model(checkpoint)
        parameters = {name for name, _ in self.model.named_parameters()}
        unfit = [n for n in (*found.missing_keys, *(n for n, *_ in found.incorrect_shapes)) if n in parameters]
        self.unfit = unfit
        if unfit and (self._resuming or len(unfit) == len(parameters)):
            most = "all weights" if self._resuming else "any weight"
            raise UserError(
                f"the checkpoint does not hold {most} of this model: {unfit[0]} is missing or of another shape "
                f"({len(unfit)} of {len(parameters)}); use the MODEL of the run that wrote it, or rename its weights"
            )
        return found


def find_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that ``last_checkpoint`` names, else that of the last iteration, else None.

    Raises:
        UserError: ``last_checkpoint`` names no file of the folder.
    """
    folder = Path(folder)
    tag = folder / _TAG
    if tag.exists():
        name = tag.read_text(encoding="utf-8", errors="replace").strip()
        if not name or not (folder / name).is_file():
            raise UserError(f"{tag} names {name!r}, which is not there: write the name of a checkpoint into it")
        return folder / name
    found = [*folder.glob(FINAL_CHECKPOINT), *sorted(folder.glob("model_[0-9]*.pth"))[-1:]]
    if len(found) > 1:  # training may have continued after the final one
        found.sort(key=lambda path: load_checkpoint(path).get("iteration", -1), reverse=True)
    return found[0] if found else None


def is_saved(trainer: TrainerBase) -> bool:
    """Tells whether the PeriodicCheckpointer saves after this iteration."""
    done = trainer.iter + 1
    return done % trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 0 or done >= trainer.max_iter


def last_iteration(trainer: TrainerBase) -> int:
    """The iteration that a checkpoint belongs to: Detectron2 counts on behind the last."""
    return min(trainer.iter, trainer.max_iter - 1)


def zero_filters(weights: Mapping[str, Any]) -> dict[str, list[int]]:
    """Finds filters whose row, bias and norm (by Detectron2's name) are 0, as a drop leaves them, by conv.

    Convs that are all zero, as deformable offsets are at first, are left out; so are transposed ones, whose rows are
    inputs.
    """
    found = {}
    for name, value in weights.items():
        if getattr(value, "ndim", 0) != 4:
            continue
        conv = name.removesuffix(".weight")
        keys = (name, f"{conv}.bias", f"{conv}.norm.weight", f"{conv}.norm.bias")
        parts = [torch.as_tensor(weights[key]) for key in keys if key in weights]
        if any(len(part) != len(value) for part in parts):
            continue
        is_on = torch.stack([part.reshape(len(part), -1).any(1) for part in parts]).any(0)
        if is_on.any() and not is_on.all():
            found[conv] = (~is_on).nonzero().flatten().tolist()
    return found
