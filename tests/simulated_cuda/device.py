"""What a simulated device computes: every operation below autograd runs on the CPU, on the same memory."""

import ctypes
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
# Launch no kernel: memory and shapes.
_NATIVE = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "set_", "resize_", "record_stream"),
    *("as_strided_", "unsqueeze_", "squeeze_", "t_", "transpose_", "detach_", "is_pinned", "is_same_size", "is_set_to"),
}
_COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
_INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# The host waits for a number, or for a size that is only known on the device.
_WAITING = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "nms"),
    *("unique_consecutive", "repeat_interleave", "bincount", "histc", "_linalg_eigh", "_linalg_check_errors"),
}
# torch.use_deterministic_algorithms lists these.
_NOT_DETERMINISTIC = {
    *("kthvalue", "median", "nanmedian", "cumsum", "histc", "bincount", "put_", "roi_align", "_roi_align_backward"),
    *("adaptive_max_pool2d_backward", "_adaptive_avg_pool2d_backward", "upsample_bilinear2d_backward"),
    *("reflection_pad2d_backward", "replication_pad2d_backward", "grid_sampler_2d_backward", "nll_loss2d_forward"),
}
_CONVOLUTIONS = {"convolution", "convolution_backward"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}

waits: Counter[str] = Counter()  # line of the code -> how often the host waited there


def install() -> None:
    """For this process, all of its threads."""
    Device().__enter__()
    run = threading.Thread.run

    def with_device(thread: threading.Thread) -> None:
        with Device():
            run(thread)

    threading.Thread.run = with_device
    # DataParallel: these call NCCL below torch's operations.
    torch.cuda.nccl.is_available = lambda tensors: False
    torch._C._broadcast_coalesced = lambda tensors, devices, size: [
        [tensor if tensor.get_device() == device else tensor.detach().to(f"cuda:{device}") for tensor in tensors]
        for device in devices
    ]


class Device(TorchDispatchMode):
    """Refuses what CUDA refuses, counts what the host waits for, and computes the rest on the CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves, form = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        target = _target(kwargs.get("device"), devices)
        if not devices and (target is None or target.type != "cuda"):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in _NATIVE or function.is_view:
            return function(*args, **kwargs)
        _refuse(name, args, tensors, devices)
        if _waits(name, args, kwargs, target):
            waits[_line()] += 1
        aliases = {id(tensor): on_cpu(tensor) for tensor in tensors if tensor.is_cuda}
        originals = {id(aliases[id(tensor)]): tensor for tensor in tensors if tensor.is_cuda}
        generator = next((leaf for leaf in leaves if isinstance(leaf, torch.Generator)), None)
        new = [_moved(leaf, aliases) for leaf in leaves]
        if _in_tf32(name):
            new = [_rounded(leaf) if isinstance(leaf, Tensor) else leaf for leaf in new]
        args, kwargs = tree_unflatten(new, form)
        run = _EMULATED.get(name, function)
        if torch.Tag.nondeterministic_seeded in function.tags:
            run = _drawing(run, generator, target)
        result = run(*args, **kwargs)
        return tree_map(lambda leaf: _back(leaf, originals, target), result)


def on_cpu(tensor: Tensor) -> Tensor:
    """A CPU tensor over the same memory."""
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    if not count:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=tensor.dtype, count=count)
    return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _target(wanted: Any, devices: set[torch.device]) -> torch.device | None:
    """Where the results go."""
    if wanted is None:
        return next(iter(devices), None)
    wanted = torch.device(wanted)
    if wanted.type == "cuda" and wanted.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return wanted


def _moved(leaf: Any, aliases: dict[int, Tensor]) -> Any:
    if isinstance(leaf, Tensor):
        return aliases.get(id(leaf), leaf)
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return None if isinstance(leaf, torch.Generator) else leaf


def _back(leaf: Any, originals: dict[int, Tensor], target: torch.device | None) -> Any:
    if not isinstance(leaf, Tensor) or target is None or target.type != "cuda":
        return originals.get(id(leaf), leaf)
    if id(leaf) in originals:
        return originals[id(leaf)]
    new = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=target)
    on_cpu(new).copy_(leaf)
    return new


def _refuse(name: str, args: tuple, tensors: list[Tensor], devices: set[torch.device]) -> None:
    if torch.are_deterministic_algorithms_enabled() and name in _NOT_DETERMINISTIC and devices:
        raise RuntimeError(f"{name} does not have a deterministic implementation on the device")
    if name in _COPIES:
        return
    if name in _INDEXED and args[0].is_cuda:  # by indices on the CPU too
        tensors = [args[0], *args[2:3]]
    if len(devices) > 1 or (devices and any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors)):
        found = sorted({str(tensor.device) for tensor in tensors})
        raise RuntimeError(f"expected all tensors of {name} to be on the same device, found {', '.join(found)}")


def _waits(name: str, args: tuple, kwargs: dict, target: torch.device | None) -> bool:
    if name == "_to_copy":
        there = args[0].device if kwargs.get("device") is None else target
        return args[0].is_cuda != (there.type == "cuda") and args[0].numel() > 0
    if name == "copy_":
        return args[0].is_cuda != args[1].is_cuda
    if name in _INDEXED:
        indices = [index for index in args[1] if index is not None]
        return any(not index.is_cuda or index.dtype in (torch.bool, torch.uint8) for index in indices)
    return name in _WAITING


def _line() -> str:
    """The innermost line of the product that is running, else of whatever is no part of torch."""
    frames = traceback.extract_stack()[::-1]
    ours = [frame for frame in frames if "/repr_det/" in frame.filename]
    others = [frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__]
    frame = [*ours, *others, frames[-1]][0]
    return f"{frame.filename.rpartition('/repr_det/')[2]}:{frame.lineno} {frame.name}"


def _drawing(run: Callable[..., Any], generator: torch.Generator | None, target: torch.device) -> Callable[..., Any]:
    """Draws from the device's generator, or from the one that is given."""
    own = generator or torch.cuda.default_generators[target.index]
    if own.device.type != "cuda":
        raise RuntimeError("expected a 'cuda' device type for generator but found 'cpu'")

    def draw(*args: Any, **kwargs: Any) -> Any:
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed((own.initial_seed() * 1_000_003 + own.get_offset()) % 2**63)
        own.set_offset(own.get_offset() + 4)
        try:
            return run(*args, **kwargs)
        finally:
            torch.default_generator.set_state(before)

    return draw


def _in_tf32(name: str) -> bool:
    if name in _CONVOLUTIONS:
        return torch.backends.cudnn.allow_tf32
    return name in _PRODUCTS and torch.backends.cuda.matmul.allow_tf32


def _rounded(tensor: Tensor) -> Tensor:
    """To the 10 bits that TF32 multiplies."""
    if tensor.dtype != torch.float32:
        return tensor
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).view_as(tensor)


def _cudnn_batch_norm(value: Tensor, weight: Any, bias: Any, mean: Any, var: Any, *options: Any) -> tuple:
    return *aten.native_batch_norm(value, weight, bias, mean, var, *options), torch.empty(0, dtype=torch.uint8)


def _cudnn_batch_norm_backward(value: Tensor, gradient: Tensor, *others: Any) -> tuple:
    *tensors, eps, _ = others
    return aten.native_batch_norm_backward(gradient, value, *tensors, True, eps, [True, True, True])


# What the CPU does not know.
_EMULATED = {"cudnn_batch_norm": _cudnn_batch_norm, "cudnn_batch_norm_backward": _cudnn_batch_norm_backward}
