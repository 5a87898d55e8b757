"""Weights from files that nobody vouches for: pickles that may hold NumPy arrays and plain containers, nothing else."""

import collections
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from repr_det.method.errors import UserError

_NUMBERS = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|f16|c8|c16)")
_PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None), np.ndarray, np.bool_, np.number)


class _ForbiddenError(pickle.UnpicklingError):
    pass


class _Name:
    """Stands for a name in a pickle: it can be called with the arguments in the file, and nothing else."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _ForbiddenError("a state for a name")


class _DType:
    """A NumPy dtype in the making; only numbers, and of its state only the byte order is looked at."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise _ForbiddenError(f"numpy.dtype {str(code)[:40]!r}, which is no kind of number")
        self.made = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise _ForbiddenError("a numpy.dtype with a state of its own")
        self.made = self.made.newbyteorder(state[1])


class _Array:
    """A NumPy array in the making."""

    made: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, content = state[-4:]
        self.made = _filled(content, dtype, shape, "F" if fortran else "C")


class _Ordered(collections.OrderedDict):
    def __setstate__(self, state: Any) -> None:
        raise _ForbiddenError("a state for OrderedDict")


def _filled(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """An array of numbers from its bytes, which must be exactly as many as it takes."""
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("an array without a dtype")
    content = content.encode("latin1") if isinstance(content, str) else content  # a pickle of Python 2
    if not isinstance(content, (bytes, bytearray)) or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array without bytes")
    return np.frombuffer(content, dtype=dtype.made).reshape(shape, order=order).copy(order)


def _scalar(dtype: Any, content: Any) -> Any:
    return _filled(content, dtype, (1,), "C")[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """``_codecs.encode``, by which Python 3 writes bytes into pickles that Python 2 reads."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode with encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("collections", "OrderedDict"): _Ordered,
    ("_codecs", "encode"): _encode,
}
for _builtins in ("__builtin__", "builtins"):  # how early protocols write b"" and sets
    _ALLOWED[_builtins, "bytes"] = lambda: b""
    _ALLOWED[_builtins, "set"] = set
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _filled


# pickle.Unpickler, the public one, keeps its memo in an array as long as the largest number in the file: a damaged file
# takes all memory. The one in Python, which is what Python falls back to, has a dict.
class _Unpickler(pickle._Unpickler):
    """Makes plain containers, and arrays from bytes of the file; NumPy's own unpickling, which trusts what a file says
    about memory, is never called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _ForbiddenError(f"{module}.{name}")
        return _Name(_ALLOWED[module, name])

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenError(f"persistent id {str(pid)[:40]!r}")

    def load_bytearray8(self) -> None:
        """As in Python, which makes room for as many bytes as the file says before it looks how many there are."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch: ClassVar = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray8}


def _finished(value: Any, done: dict[int, Any]) -> Any:
    """``value`` with arrays in the place of those in the making; a genuine file finishes what it begins.

    Args:
        done: id -> the finished container, for containers that are met again.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, _Array) and value.made is not None:
        return value.made
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, dict):
        done[id(value)] = made = collections.OrderedDict() if isinstance(value, _Ordered) else {}
        made.update({_finished(key, done): _finished(inner, done) for key, inner in value.items()})
    elif isinstance(value, (list, tuple, set, frozenset)):
        done[id(value)] = made = type(value)(_finished(inner, done) for inner in value)
    else:
        raise pickle.UnpicklingError(f"a {type(value).__name__.strip('_')} without its content")
    return made


def load_restricted(path: str | Path) -> Any:
    """Reads a pickle, such as Detectron2's official ``.pkl`` weights, without running anything that it names.

    Only NumPy arrays and scalars of numbers, plain numbers, text, bytes, list, tuple, set, dict and OrderedDict come
    out. Strings of Python 2 are read as latin1, as official files need.

    Raises:
        UserError: the file is missing, cut short, no pickle, or names anything else; one line.
    """
    path = _existing(path)
    try:
        return _finished(_Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load(), {})
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
    """A checkpoint as Detectron2 or torch wrote it: ``.pkl`` (``load_restricted``), anything else as ``weights_only``.

    Args:
        map_location: "meta" leaves the tensors of a torch file unread.

    Returns:
        The dict in the file.

    Raises:
        UserError: the file is missing, cut short, of another kind, or holds more than tensors and plain containers.
    """
    path = _existing(path)
    is_pickle = path.suffix == ".pkl" and not zipfile.is_zipfile(path)
    loaded = load_restricted(path) if is_pickle else _load_torch(path, map_location)
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
    if not path.is_file():
        wrong = "is not a file" if path.exists() else "does not exist"
    elif path.stat().st_size == 0:
        wrong = "is empty"
    elif path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: git lfs pull fetches it")
    else:
        return path
    raise UserError(f"{path} {wrong}: give the path of a checkpoint (.pth or .pkl)")


def _one_line(error: Exception, reason: str, most: int = 100) -> str:
    sentence = " ".join(reason.split()).split(". ")[0]
    return f"{type(error).__name__}: {sentence[:most]}".rstrip(": ")
