"""Checkpoints that are whole or absent, that run nothing, and that are found if ``last_checkpoint`` is lost."""

import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from repr_det.method.errors import UserError
from repr_det.runs.files import FINAL_CHECKPOINT, advice_for, replacing, write_atomically
from repr_det.runs.safe_pickle import load_checkpoint

logger = logging.getLogger("repr_det.resume")
_TAG = "last_checkpoint"
_DICTS = ("state_dict", "model_state_dict", "model_state", "model")
_PREFIXES = ("module.", "model.", "module.")  # taken off in this order, where all names have them
_FIRST_BLOCK = "layer1.0.conv1.weight"  # of torchvision's and timm's ResNets
_RENAMED = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    *((rf"^layer{stage}\.", f"res{stage + 1}.") for stage in (1, 2, 3, 4)),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


class AtomicCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer whose files are whole or absent: written beside their place and renamed into it.

    It executes nothing that a file contains: torch files are loaded as weights only, pickles by a restricted unpickler.
    If ``last_checkpoint`` is missing, the newest checkpoint of the folder takes its place."""

    _resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        """As DetectionCheckpointer.save; ``last_checkpoint`` changes only once the file is on the disk."""
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir) / f"{name}.pth"
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with replacing(path, "wb") as file:
                torch.save({"model": self.model.state_dict(), **states, **kwargs}, file)
            write_atomically(path.with_name(_TAG), path.name)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # where torch writes its files
                raise
            if isinstance(error.__context__, OSError):
                error = error.__context__  # what the system said, which torch hides behind an error of its own
            raise UserError(
                f"the checkpoint {name} could not be written to {self.save_dir}: {str(error).splitlines()[0]}; the "
                f"checkpoints before it are untouched: {advice_for(error)}, then --resume"
            ) from error

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Returns that of ``find_checkpoint``, or ''."""
        return str(find_checkpoint(self.save_dir) or "") if self.save_dir else ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As in Detectron2; a run that is resumed must find every weight of its model."""
        self._resuming = resume and self.has_checkpoint()
        if self._resuming and not (Path(self.save_dir) / _TAG).exists():
            name = os.path.basename(self.get_checkpoint_file())
            logger.warning("%s has no %s: resuming from %s, its newest checkpoint", self.save_dir, _TAG, name)
        return super().resume_or_load(path, resume=resume)

    def _load_file(self, filename: str) -> dict[str, Any]:
        """As in Detectron2, which would run what a .pkl or .pyth names."""
        if not filename.endswith((".pkl", ".pyth")):
            return super()._load_file(filename)
        data = load_checkpoint(filename)
        if filename.endswith(".pyth"):
            weights, author, left_out = data.get("model_state"), "pycls", "num_batches_tracked"
            if not isinstance(weights, dict):
                raise UserError(f"{filename}: weights of pycls (.pyth) lie under 'model_state', which it does not hold")
        elif "model" in data and "__author__" in data:
            return data
        else:
            weights, author, left_out = data.get("blobs", data), "Caffe2", "_momentum"
        weights = {name: value for name, value in weights.items() if not name.endswith(left_out)}
        return {"model": weights, "__author__": author, "matching_heuristics": True}

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


def find_checkpoint(folder: str | Path) -> Path | None:
    """Returns the checkpoint that ``last_checkpoint`` names, else the newest; None if there is none.

    Raises:
        UserError: ``last_checkpoint`` names no file of the folder.
    """
    folder = Path(folder)
    tag = folder / _TAG
    if tag.exists():
        name = tag.read_text(encoding="utf-8", errors="replace").strip()
        if not name or not (folder / name).is_file():
            raise UserError(
                f"{tag} names {name!r}, which is not there: write the name of a checkpoint in that folder into it"
            )
        return folder / name
    found = [*sorted(folder.glob("model_[0-9]*.pth")), *folder.glob(FINAL_CHECKPOINT)]
    return found[-1] if found else None


def check_last_checkpoint(folder: str) -> None:
    """Raises UserError if a run in ``folder`` cannot be resumed: see ``find_checkpoint``, or the file is damaged."""
    path = find_checkpoint(folder)
    if path is None:
        return
    try:
        load_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}; to resume from an older one write its name into {Path(folder) / _TAG}") from error


def fit_names(checkpoint: dict[str, Any], names: Collection[str]) -> None:
    """Renames the weights in ``checkpoint``, {"model": weights, ...}, if none has one of the model's ``names``.

    The dicts around the weights and common prefixes are taken off; names of torchvision's and timm's ResNets become
    Detectron2's.
    """
    weights, names = checkpoint["model"], set(names)
    if not isinstance(weights, dict) or checkpoint.get("matching_heuristics") or not names.isdisjoint(weights):
        return
    while inner := [key for key in _DICTS if isinstance(weights.get(key), dict)]:
        weights = weights[inner[0]]
    weights = {str(name): value for name, value in weights.items()}
    for prefix in _PREFIXES:
        if names.isdisjoint(weights) and weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    roots = [name.removesuffix(_FIRST_BLOCK) for name in weights if name.endswith(_FIRST_BLOCK)]
    # One ResNet with the usual stem.
    if names.isdisjoint(weights) and len(roots) == 1 and f"{roots[0]}conv1.weight" in weights:
        root = roots[0]
        weights = {_renamed(name.removeprefix(root)): weights[name] for name in weights if name.startswith(root)}
        checkpoint["matching_heuristics"] = True
        logger.info(
            "Names of a ResNet of torchvision or timm converted to Detectron2's: such weights expect INPUT.FORMAT RGB, "
            "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], MODEL.PIXEL_STD [58.395, 57.12, 57.375] and "
            "MODEL.RESNETS.STRIDE_IN_1X1 False"
        )
    checkpoint["model"] = weights


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def zero_filters(weights: Mapping[str, Any]) -> dict[str, list[int]]:
    """Returns, per conv, the filters whose row, bias and norm (by Detectron2's name) are 0, as a drop leaves them.

    A conv whose filters are all zero is one that begins so (deformable offsets, a zero-initialised output), not one
    that lost some.
    """
    found = {}
    for name, value in weights.items():
        if getattr(value, "ndim", 0) != 4:
            continue
        conv = name.removesuffix(".weight")
        keys = (name, f"{conv}.bias", f"{conv}.norm.weight", f"{conv}.norm.bias")
        parts = [torch.as_tensor(weights[key]) for key in keys if key in weights]
        is_on = torch.stack([part.reshape(len(part), -1).any(1) for part in parts]).any(0)
        if is_on.any() and not is_on.all():
            found[conv] = (~is_on).nonzero().flatten().tolist()
    return found
