"""CUDA tensors without a GPU, for a whole process: ``pytest -p simulated_cuda.plugin -m gpu``.

runtime.c is a CUDA runtime whose device memory is host memory, ``device`` computes on the CPU what is asked of it, and
``nccl`` is gloo by NCCL's rules. ``plugin`` starts them when it is imported, before torch. SIMULATED_CUDA_DEVICES=2
gives two devices.

Seen are devices that are mixed up, what the host waits for, and what CUDA has no deterministic kernel for. Not seen are
speed, memory, races of streams, and the rounding of kernels, but for that of TF32.
"""

import ctypes
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

_PACKAGES = Path(sysconfig.get_paths()["purelib"])
_HEADERS = sorted(path.parent for path in _PACKAGES.glob("nvidia/*/include/driver_types.h"))
_MORE_HEADERS = _PACKAGES / "triton" / "backends" / "nvidia" / "include"  # those that torch's wheels leave out


def missing() -> str:
    """What the simulation needs and this machine does not have; "" where it has all."""
    if shutil.which("gcc") is None:
        return "needs gcc"
    return "" if _HEADERS and _MORE_HEADERS.exists() else "needs a CUDA build of torch"


def load_runtime() -> None:
    """Puts the runtime before NVIDIA's: what is loaded first, for all, is what torch finds."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"  # so named, the driver's place is taken too
        source = Path(__file__).with_name("runtime.c")
        command = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{_HEADERS[0]}"]
        subprocess.run([*command, f"-I{_MORE_HEADERS}", "-o", str(library), str(source)], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
