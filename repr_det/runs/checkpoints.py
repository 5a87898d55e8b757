"""Checkpoints that are whole or absent, that run nothing, and that are found where ``last_checkpoint`` is lost."""

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from repr_det.method.errors import UserError
from repr_det.runs.files import advice_for, write_atomically
from repr_det.runs.safe_pickle import load_checkpoint
from repr_det.runs.weights import fit_names

logger = logging.getLogger("repr_det.resume")
_SAVING = ".saving-"
_TAG = "last_checkpoint"


class AtomicCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer whose files are whole or absent: written beside their place and renamed into it.

    It executes nothing that a file contains: torch files are loaded as weights only, pickles by a restricted unpickler.
    If ``last_checkpoint`` is missing, the newest whole checkpoint of the folder takes its place."""

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
            while not isinstance(error, OSError) and error.__context__ is not None:
                error = error.__context__  # what the system said, which torch hides behind an error of its own
            raise UserError(
                f"the checkpoint {name} could not be written to {final}: {str(error).splitlines()[0]}; the checkpoints "
                f"before it are untouched: {advice_for(error)}, then --resume"
            ) from error
        finally:
            self.save_dir = final

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """That of ``last_checkpoint``, else the newest whole one, else ''."""
        return str(find_checkpoint(self.save_dir) or "") if self.save_dir else ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As in Detectron2; a run that is resumed must find every weight of its model."""
        self._resuming = resume and self.has_checkpoint()
        if self._resuming and not (Path(self.save_dir) / _TAG).exists():
            name = os.path.basename(self.get_checkpoint_file())
            logger.warning("%s has no %s: resuming from %s, its newest whole checkpoint", self.save_dir, _TAG, name)
        return super().resume_or_load(path, resume=resume)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pyth"):  # pycls
            weights = load_checkpoint(filename).get("model_state")
            if not isinstance(weights, dict):
                raise UserError(f"{filename}: weights of pycls (.pyth) lie under 'model_state', which it does not hold")
            weights = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
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
        fit_names(checkpoint, self.model.state_dict())
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
        write_atomically(os.path.join(self._final, _TAG), last_filename_basename)


def find_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that a resumed run continues from: the one that ``last_checkpoint`` names, else the newest whole
    one; None if the folder holds none.

    Raises:
        UserError: ``last_checkpoint`` names no file of the folder, or no checkpoint is whole.
    """
    folder = Path(folder)
    tag = folder / _TAG
    if tag.exists():
        name = ""
        with suppress(UnicodeDecodeError):
            name = tag.read_text(encoding="utf-8").strip()
        if not name or not (folder / name).is_file():
            raise UserError(
                f"{tag} names {name!r}, which is not there: write the name of a checkpoint in that folder into it"
            )
        return folder / name
    iterations = {file: _iteration_of(file) for file in sorted(folder.glob("model_*.pth"))}
    newest = max(iterations, key=iterations.__getitem__, default=None)
    if newest is not None and iterations[newest] < 0:
        names = ", ".join(file.name for file in list(iterations)[:3])
        raise UserError(
            f"{folder} has no {_TAG}, and none of its checkpoints is whole ({names}): give another OUTPUT_DIR"
        )
    return newest


def _iteration_of(file: Path) -> int:
    """-1 for a file from which no run can continue; its tensors are not read."""
    try:
        return int(load_checkpoint(file, map_location="meta")["iteration"])
    except (UserError, KeyError, TypeError, ValueError):
        return -1


def check_last_checkpoint(folder: str) -> None:
    """Raises UserError where a run in ``folder`` cannot be resumed: see ``find_checkpoint``, or the file is damaged."""
    path = find_checkpoint(folder)
    if path is None:
        return
    try:
        load_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}; to resume from an older one write its name into {Path(folder) / _TAG}") from error


def remove_unfinished_saves(folder: str) -> None:
    """Deletes what a killed ``AtomicCheckpointer.save`` left behind."""
    for leftover in Path(folder).glob(f"{_SAVING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
