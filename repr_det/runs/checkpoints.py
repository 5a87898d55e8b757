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
from repr_det.runs.files import write_atomically
from repr_det.runs.foreign_weights import fit_names
from repr_det.runs.safe_pickle import load_checkpoint

logger = logging.getLogger("repr_det.resume")
_SAVING = ".saving-"
_TAG = "last_checkpoint"


class AtomicCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer whose files are whole or absent (written beside their place and renamed into it), and which
    executes nothing that a file contains: torch files are loaded as weights only, pickles by a restricted unpickler.
    Where ``last_checkpoint`` is missing, the newest whole checkpoint of the folder takes its place."""

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
    """The checkpoint that a resumed run continues from: the one that ``last_checkpoint`` names, or where there is no
    such file the newest whole one (the largest iteration). None where the folder holds no ``.pth`` file.

    Raises:
        UserError: ``last_checkpoint`` names no file of the folder, or no ``.pth`` file can be continued from.
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
    files = sorted(folder.glob("*.pth"))
    states = sorted(filter(None, map(_training_state, files)), reverse=True)
    if (whole := next((file for _, _, file in states if _is_whole(file)), None)) is None and files:
        raise UserError(
            f"{folder} has no {_TAG}, and no whole checkpoint of a run is among its files "
            f"({', '.join(file.name for file in files[:3])}): give another OUTPUT_DIR"
        )
    return whole


def _training_state(file: Path) -> tuple[int, bool, Path] | None:
    """(iteration, whether it holds the random states of that iteration, file) of a checkpoint of a run; its tensors are
    not read."""
    try:
        found = load_checkpoint(file, map_location="meta")
        iteration, hooks = int(found["iteration"]), found["trainer"].get("hooks", {})
        return iteration, hooks.get("ExactResume", {}).get("iteration") == iteration, file
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _is_whole(file: Path) -> bool:
    with suppress(UserError):
        load_checkpoint(file)
        return True
    return False


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


def _reason(error: BaseException) -> str:
    """What the system said where torch hides it behind an error of its own."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0]
