"""Weights from files that nobody vouches for: NumPy arrays and plain containers, nothing else."""

import collections
import io
import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from repr_det.method.errors import UserError

_PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None), np.ndarray, np.bool_, np.number)
_NATIVE_ORDERS = ("=", "|", "<" if sys.byteorder == "little" else ">")


def _forbidden(name: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"GLOBAL {name} was not an allowed one")  # as torch words it


def _dtype(code: str, *_: Any) -> np.dtype:
    if not isinstance(code, str) or np.dtype(code).kind not in "biufc":
        raise _forbidden(f"numpy.dtype {str(code)[:40]!r}, which is no kind of number")
    return np.dtype(code)


def _array(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    content = content.encode("latin1") if isinstance(content, str) else content  # a pickle of Python 2
    sizes = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not (isinstance(content, (bytes, bytearray)) and isinstance(dtype, np.dtype) and sizes):
        raise pickle.UnpicklingError("an array without bytes, numbers or shape")
    return np.frombuffer(content, dtype=dtype).reshape(shape, order=order).copy(order)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),  # how early protocols write bytes
}
for _builtins in ("__builtin__", "builtins"):  # how they write b"" and sets
    _ALLOWED[_builtins, "bytes"] = lambda: b""
    _ALLOWED[_builtins, "set"] = set
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = lambda *_: np.empty(0)
    _ALLOWED[f"{_core}.multiarray", "scalar"] = lambda dtype, content: _array(content, dtype, (1,), "C")[0]
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _array


# The memo of pickle.Unpickler is an array as long as the largest number in the file: a damaged file takes all memory.
# This one's is a dict.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _forbidden(f"{module}.{name}")
        return _ALLOWED[module, name]

    def load_build(self) -> None:
        """NumPy trusts what a state says of memory: it is given the state of an array made here."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, np.ndarray) and made.size == 0:
            shape, dtype, fortran, content = state[-4:]
            made.__setstate__(_array(content, dtype, shape, "F" if fortran else "C").__reduce__()[2])
        elif not isinstance(made, np.dtype) or state[1] not in _NATIVE_ORDERS:
            raise _forbidden(f"a state for {str(made)[:40]!r}")

    def load_bytearray8(self) -> None:
        """Python's makes room for as many bytes as the file says before it reads them."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch: ClassVar = pickle._Unpickler.dispatch | {
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def _check_plain(value: Any) -> None:
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, _PLAIN) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting += one
        else:
            raise pickle.UnpicklingError(f"a {type(one).__name__} without its content")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads the dict that Detectron2 or torch wrote, without running anything that it names.

    A ``.pkl``, such as Detectron2's official weights, gives arrays, numbers, text, bytes and containers, with strings
    of Python 2 as latin1; other files are read as ``weights_only``.

    Raises:
        UserError: the file is missing, cut short, of another kind, or names more than that.
    """
    path = _existing(path)
    is_pickle = path.suffix == ".pkl" and not zipfile.is_zipfile(path)
    try:
        if is_pickle:
            loaded = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
            _check_plain(loaded)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        if forbidden := re.search(r"GLOBAL (.+?) (?:was not an allowed|whose module)", str(error)):
            raise UserError(
                f"{path}: refused, it names {forbidden[1]}, and weights are arrays and plain containers only"
            ) from error
        # torch first explains at length how to load it anyway.
        reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split()).split(". ")[0]
        kind = "pickle of weights" if is_pickle else "torch checkpoint"
        raise UserError(
            f"{path}: not a readable {kind}, perhaps cut short ({type(error).__name__}: {reason[:100]})"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a dict of weights, found {type(loaded).__name__}")
    return loaded


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file() or path.stat().st_size == 0:
        wrong = "is empty" if path.is_file() else "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {wrong}: give the path of a checkpoint (.pth or .pkl)")
    if path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: git lfs pull fetches it")
    return path
