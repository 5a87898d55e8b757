"""FLOPs of a training step: fvcore's count of the forward pass, torch's of forward and backward together."""

import logging

from detectron2.export import TracingAdapter
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repr_det.method.slim import traced_slim
from repr_det.studies.benchmarking.case import Bench


def forward_flops(model: nn.Module, batch: list[dict]) -> int:
    """Multiply-adds of the losses' forward pass by fvcore (convs, linear layers, norms), in training mode."""
    adapter = TracingAdapter(
        model, batch, inference_func=lambda module, inputs: [sum(module(inputs).values())], allow_non_tensor=True
    )
    analysis = FlopCountAnalysis(adapter, adapter.flattened_inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return int(analysis.total())


def step_flops(bench: Bench) -> int:
    """Floating-point operations (2 a multiply-add) of the convs and matrix products of one whole step."""
    with FlopCounterMode(display=False) as counter:
        bench.step(seed=0)
    return counter.get_total_flops()


def count(bench: Bench, batch: list[dict]) -> dict[str, float]:
    """Of a bench whose filters are dropped: masked ("dense", it computes all channels), slim, and slim without the
    channels that fill up kept counts to multiples ("exact")."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    found = {"forward_dense": forward_flops(bench.model, batch), "step_dense": step_flops(bench)}
    for name, multiple in (("slim", None), ("exact", 1)):
        with bench.slim(multiple), traced_slim():
            found[f"forward_{name}"] = forward_flops(bench.model, batch)
            found[f"step_{name}"] = step_flops(bench)
    for scope in ("forward", "step"):
        for name in ("slim", "exact"):
            found[f"{scope}_{name}_ratio"] = found[f"{scope}_{name}"] / found[f"{scope}_dense"]
    return found
