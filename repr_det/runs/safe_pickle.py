"""Weights from files that nobody vouches for: pickles that may hold NumPy arrays and plain containers, nothing else."""

import collections
import io
import pickle
import re
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


class _DType:
    """A NumPy dtype in the making; only numbers, and of its state only the byte order is looked at."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise _ForbiddenError(f"numpy.dtype {str(code)[:40]!r}, which is no kind of number")
        self.made = np.dtype(code)

    def build(self, state: Any) -> "_DType":
        order = state[1]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise _ForbiddenError("a numpy.dtype with a state of its own")
        self.made = self.made.newbyteorder(order)
        return self


class _Array:
    """A NumPy array in the making."""

    def build(self, state: Any) -> np.ndarray:
        shape, dtype, fortran, content = state[-4:]
        return _filled(content, dtype, shape, "F" if fortran else "C")


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


class _Name:
    """What a pickle gets for a name: it can be called with the arguments in the file, and nothing else."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make


_ALLOWED = {
    ("numpy", "ndarray"): _Name(_Array),
    ("numpy", "dtype"): _Name(_DType),
    ("collections", "OrderedDict"): _Name(collections.OrderedDict),
    ("_codecs", "encode"): _Name(_encode),
}
for _builtins in ("__builtin__", "builtins"):  # how early protocols write b"" and sets
    _ALLOWED[_builtins, "bytes"] = _Name(lambda: b"")
    _ALLOWED[_builtins, "set"] = _Name(set)
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Name(lambda *_: _Array())
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _Name(_scalar)
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _Name(_filled)


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python, whose instructions can be replaced one by one, and whose memo is a dict: C's is an array
    as long as the largest number that a damaged file names.

    Only a name in ``_ALLOWED`` is called, and only with the arguments in the file; C code of NumPy gets none of them
    unchecked. BUILD fills arrays and dtypes in the making and is refused for everything else.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _ForbiddenError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenError(f"persistent id {str(pid)[:40]!r}")

    def load_reduce(self) -> None:
        arguments, name = self.stack.pop(), self.stack[-1]
        if type(name) is not _Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError("a call of something that has no name")
        self.stack[-1] = name.make(*arguments)

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, (_DType, _Array)) or type(state) is not tuple:
            raise _ForbiddenError(f"a state for {type(made).__name__}")
        built = self.stack[-1] = made.build(state)
        for number in reversed(self.memo):  # it has been noted a few instructions ago
            if self.memo[number] is made:
                self.memo[number] = built
                break

    def refuse(self) -> None:
        raise _ForbiddenError("an instruction that makes objects of classes")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = refuse


def load_restricted(path: str | Path) -> Any:
    """Reads a pickle, such as Detectron2's official ``.pkl`` weights, without running anything that it names.

    Only NumPy arrays and scalars of numbers, plain numbers, text, bytes, list, tuple, set, dict and OrderedDict come
    out. Strings of Python 2 are read as latin1, as official files need.

    Raises:
        UserError: the file is missing, cut short, no pickle, or names anything else; one line.
    """
    path = _existing(path)
    try:
        loaded = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        _check_plain(loaded)
        return loaded
    except _ForbiddenError as error:
        raise UserError(
            f"{path}: refused, it names {error}, and weights are NumPy arrays and plain containers only; the file was "
            "not executed"
        ) from error
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise UserError(
            f"{path}: not a readable pickle of weights, perhaps cut short ({_one_line(error, str(error))})"
        ) from error


def _check_plain(loaded: Any) -> None:
    """Nothing in the making is left over: a genuine file finishes what it begins."""
    seen, left = set(), [loaded]
    while left:
        value = left.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            left += value
        else:
            raise pickle.UnpicklingError(f"a {type(value).__name__.strip('_')} without its content")


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
