"""Weights from files that nobody vouches for: pickles that may hold NumPy arrays and plain containers, nothing else."""

import collections
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repr_det.method.errors import UserError


# Instances without a __dict__, so that a pickle cannot change them by its BUILD instruction.
class _Latin1:
    """Stands for ``_codecs.encode``, by which Python 3 writes bytes into pickles that Python 2 reads."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"_codecs.encode with encoding {encoding!r}")
        return text.encode("latin1")


class _FromBuffer:
    """Stands for NumPy's ``_frombuffer``, by which pickle protocol 5 brings arrays back."""

    __slots__ = ()

    def __call__(self, buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
        return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order).copy()


_multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _Latin1(),
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _multiarray._reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _multiarray.scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _FromBuffer()


class _ForbiddenError(pickle.UnpicklingError):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _ForbiddenError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenError(f"persistent id {str(pid)[:40]!r}")


def load_restricted(path: str | Path) -> Any:
    """Reads a pickle, such as Detectron2's official ``.pkl`` weights, without running anything that it names.

    Only NumPy arrays and scalars, numbers, text, bytes, list, tuple, set, dict and OrderedDict come out. Strings of
    Python 2 are read as latin1, as official files need.

    Raises:
        UserError: the file is missing, cut short, no pickle, or names anything else; one line.
    """
    path = _existing(path)
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except _ForbiddenError as error:
        raise UserError(
            f"{path}: refused, it names {error}, and weights are NumPy arrays and plain containers only; the file was "
            "not executed"
        ) from error
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise UserError(
            f"{path}: not a readable pickle of weights, perhaps cut short ({_one_line(error, str(error))})"
        ) from error


def load_checkpoint(path: str | Path, map_location: str = "cpu") -> dict[str, Any]:
    """A checkpoint as Detectron2 or torch wrote it: ``.pth`` (``weights_only``) or ``.pkl`` (``load_restricted``).

    Args:
        map_location: "meta" leaves the tensors of a torch file unread.

    Returns:
        The dict in the file.

    Raises:
        UserError: the file is missing, cut short, of another kind, or holds more than tensors and plain containers.
    """
    path = _existing(path)
    loaded = (
        load_restricted(path)
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path)
        else _load_torch(path, map_location)
    )
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a dict of weights, found {type(loaded).__name__}")
    return loaded


def _load_torch(path: Path, map_location: str) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        if forbidden := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
            raise UserError(
                f"{path}: refused, it names {forbidden.group(1)}, and weights are tensors and plain containers only; "
                "the file was not executed"
            ) from error
        # torch explains at length how to load it anyway; what went wrong comes after.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]
        raise UserError(
            f"{path}: not a readable torch checkpoint, perhaps cut short ({_one_line(error, reason)})"
        ) from error


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path of a checkpoint (.pth or .pkl)")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of a checkpoint (.pth or .pkl)")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: give the path of a checkpoint (.pth or .pkl)")
    return path


def _one_line(error: Exception, reason: str, most: int = 100) -> str:
    sentence = " ".join(reason.split()).split(". ")[0]
    return f"{type(error).__name__}: {sentence[:most]}".rstrip(": ")
