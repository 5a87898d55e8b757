#!/usr/bin/env python
"""Measures what RePr costs beside stock Detectron2, on synthetic batches.

tools/benchmark.py [--config-file FILE] [--size 800x1333] [--batch 2] [--device cuda] [--output FOLDER] [KEY VALUE ...]

Three detectors with the same random weights take turns: stock Detectron2, S1 (the full network with RePr) and S2 (the
sub-network, its dropped filters held at zero).
"""

import repr_det.commands  # noqa: F401  # isort: skip  # first: it silences warnings of what is imported next
import argparse
import json
import logging
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch.utils.benchmark import Timer, timer

from repr_det import RePrHook, RePrScheme, UserError
from repr_det.commands.arguments import build_config

STOCK, S1, S2 = "stock", "S1", "S2"
# torch's timer waits for a GPU; on a CPU that others use as well, seconds of this process alone are less noisy.
CLOCKS = {"wall": timer, "cpu": time.process_time}
PARTS = ("steps", "transitions", "prediction", "memory", "flops")
# "small": the heads of a configuration that a CPU trains, so that the backbone is what counts.
HEADS = {
    "stock": "",
    "small": "MODEL.RPN.PRE_NMS_TOPK_TRAIN 300 MODEL.RPN.POST_NMS_TOPK_TRAIN 100 MODEL.ROI_BOX_HEAD.NUM_FC 1 "
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 64 MODEL.ROI_BOX_HEAD.FC_DIM 256",
}
# A step takes the same time at any learning rate; at this one no random network diverges.
SYNTHETIC = "SEED 1 SOLVER.BASE_LR 1e-9 MODEL.PIXEL_STD [57.375,57.12,58.395] REPR.ENABLED True"
COCO_ITERATIONS = {"1x": 90_000, "3x": 270_000}
# glibc then returns every freed tensor to the system; otherwise fragments add up to 5 % to a peak.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Detector:
    """A detector with Detectron2's own trainer, with RePrHook or without, on one synthetic batch of (height, width)."""

    def __init__(self, cfg: CfgNode, size: tuple[int, int], with_repr: bool) -> None:
        torch.manual_seed(cfg.SEED)
        self.model = build_model(cfg)
        last_norm = "conv3.norm" if cfg.MODEL.RESNETS.DEPTH >= 50 else "conv2.norm"
        for name, module in self.model.named_modules():
            # FrozenBN normalises nothing: with weights of 1 the random signal grows in every residual block.
            if isinstance(module, FrozenBatchNorm2d) and name.endswith(last_norm):
                module.weight.fill_(0.2)
        self.batch = synthetic_batch(cfg.SOLVER.IMS_PER_BATCH, *size)
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self.trainer = trainer_class(self.model, [self.batch] * 100_000, build_optimizer(cfg, self.model))
        self.trainer.storage = EventStorage(0)
        self.trainer.iter = self.trainer.start_iter = 0
        self.trainer.max_iter = cfg.SOLVER.MAX_ITER
        if with_repr:
            self.hook = RePrHook(cfg)
            self.trainer.register_hooks([self.hook])
            self.hook.before_train()

    def step(self) -> None:
        """Runs one iteration as TrainerBase.train does, always with the same random proposals."""
        torch.manual_seed(0)
        with self.trainer.storage:
            self.trainer.before_step()
            self.trainer.run_step()
            self.trainer.after_step()

    def predict(self) -> None:
        """Detects objects in the images of the batch."""
        self.model.eval()
        with torch.no_grad():
            self.model(self.batch)
        self.model.train()


def synthetic_batch(images: int, height: int, width: int, boxes: int = 5) -> list[dict]:
    """Makes images of noise with a few random boxes each, as Detectron2's data loaders give them."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.tensor([width, height])
    batch = []
    for _ in range(images):
        corner = torch.rand(boxes, 2, generator=generator) * 0.6 * sides
        extent = 16 + torch.rand(boxes, 2, generator=generator) * 0.3 * sides
        target = Instances((height, width))
        target.gt_boxes = Boxes(torch.cat([corner, corner + extent], 1).clamp(max=sides.repeat(2)))
        target.gt_classes = torch.zeros(boxes, dtype=torch.long)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "height": height, "width": width, "instances": target})
    return batch


def row(what: str, unit: str, values: Sequence[float], ratios: Sequence[float] = ()) -> dict[str, Any]:
    """Median and quartiles of measurements, and of their ratios to stock Detectron2 if there are any."""
    found: dict[str, Any] = {"what": what, "unit": unit, **spread(values)}
    if len(ratios):
        found["to_stock"] = spread(ratios)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.percentile(values, q)) for name, q in (("median", 50), ("q1", 25), ("q3", 75))}


def measure(cfg: CfgNode, size: tuple[int, int], args: argparse.Namespace) -> Iterator[list[dict]]:
    """Yields the rows of one part after the other."""
    arms = {name: Detector(cfg, size, with_repr=name != STOCK) for name in (STOCK, S1, S2)}
    for detector in arms.values():
        detector.step()
    scheme = arms[S2].hook.scheme
    clock = CLOCKS[args.clock]
    transitions = time_transitions(scheme, args.repeats if "transitions" in args.only else 0, clock)
    scheme.drop()
    dropped = {layer.name: (int(scheme.masks[layer.name].sum()), layer.num_filters) for layer in scheme.layers}
    number, filters = np.sum(list(dropped.values()), axis=0)
    yield [row("filters dropped in S2", "", [number]), row("filters of RePr's layers", "", [filters])]
    if "steps" in args.only or "transitions" in args.only:
        steps = take_turns("step", arms, args.pairs, clock)
        yield compare("step", steps)
    if "transitions" in args.only:
        yield transition_rows(transitions, float(np.median(steps[STOCK])), cfg.REPR.NUM_CYCLES)
    if "flops" in args.only:
        yield flop_rows(arms[S2], dropped)
    if "prediction" in args.only:
        yield compare("prediction", take_turns("predict", arms, args.pairs, clock))
    if "memory" in args.only:
        yield memory_rows(cfg, size)


def take_turns(method: str, arms: dict[str, Detector], rounds: int, clock: Callable) -> dict[str, list[float]]:
    """Arm -> seconds of ``method`` in every round, in which all arms run it, in an order that turns."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        print(f"  {method}, round {number + 1} of {rounds}", flush=True)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            run = {"run": getattr(arms[name], method)}
            run_timer = Timer("run()", globals=run, timer=clock, num_threads=torch.get_num_threads())
            # It runs once to warm up, then at least once that counts.
            seconds[name].append(run_timer.blocked_autorange(min_run_time=0.01).median)
    return seconds


def compare(what: str, seconds: dict[str, list[float]]) -> list[dict]:
    """A row for every arm. Ratios are those of the rounds, so that a slow minute of the machine cancels out."""
    rows = []
    for name, values in seconds.items():
        ratios = [value / stock for value, stock in zip(values, seconds[STOCK], strict=True)]
        rows.append(row(f"{what}, {name}", "s", values, ratios if name != STOCK else ()))
    return rows


def time_transitions(scheme: RePrScheme, repeats: int, clock: Callable) -> dict[str, list[float]]:
    """Transition -> seconds with their passes over data, after one of each that does not count."""
    seconds: dict[str, list[float]] = {"drop": [], "restore": []}
    for _ in range(repeats and repeats + 1):
        for name, transition in (("drop", scheme.drop), ("restore", scheme.restore)):
            start = clock()
            transition()
            seconds[name].append(clock() - start)
    return {name: values[1:] for name, values in seconds.items()}


def transition_rows(seconds: dict[str, list[float]], stock_step: float, cycles: int) -> list[dict]:
    """Drop and restore, in seconds and in stock steps, and their share of runs on COCO in percent."""
    rows = [row(name, "s", values, [x / stock_step for x in values]) for name, values in seconds.items()]
    both = np.add(seconds["drop"], seconds["restore"])
    for name, iterations in COCO_ITERATIONS.items():
        rows.append(row(f"transitions of a {name} run", "%", 100 * cycles * both / (iterations * stock_step)))
    return rows


def flop_rows(detector: Detector, dropped: dict[str, tuple[int, int]]) -> list[dict]:
    """Multiply-adds of the convs for one image, as fvcore counts them, and the shares of them that belong to
    RePr's layers and to dropped filters (which S2 computes all the same)."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    detector.model.eval()
    counted = FlopCountAnalysis(detector.model, [{"image": detector.batch[0]["image"]}]).tracer_warnings("none")
    by_module = counted.by_module_and_operator()  # of a module "model.backbone...", "" is the whole
    convs = by_module[""]["conv"] / 1e9
    layers = {name: by_module[f"model.{name}"]["conv"] / 1e9 for name in dropped}
    detector.model.train()
    zero = sum(layers[name] * number / filters for name, (number, filters) in dropped.items())
    found = {"convs": convs, "convs that RePr applies to": sum(layers.values()), "dropped filters": zero}
    return [row(what, "GMAC", [value], [value / convs]) for what, value in found.items()]


def memory_rows(cfg: CfgNode, size: tuple[int, int]) -> list[dict]:
    """Peak memory of steps and transitions; stock and RePr have a process of their own each."""
    os.environ.update(ALLOCATOR)
    peaks: dict[str, int] = {}
    for with_repr in (False, True):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            peaks |= process.submit(peak_memory, cfg, size, with_repr, torch.get_num_threads()).result()
    stock = peaks[f"step, {STOCK}"]
    return [row(f"memory, {what}", "MiB", [peak / 2**20], [peak / stock]) for what, peak in peaks.items()]


def peak_memory(cfg: CfgNode, size: tuple[int, int], with_repr: bool, threads: int) -> dict[str, int]:
    """Stage -> bytes that this process, which must not have done anything else, held at once."""
    torch.set_num_threads(threads)
    detector = Detector(cfg, size, with_repr)

    def steps() -> None:
        for _ in range(3):
            detector.step()

    stages = {f"step, {STOCK}": steps}
    if with_repr:
        scheme = detector.hook.scheme
        stages = {f"step, {S1}": steps, "drop": scheme.drop, f"step, {S2}": steps, "restore": scheme.restore}
    return {what: peak_of(run, cfg.MODEL.DEVICE) for what, run in stages.items()}


def peak_of(run: Callable[[], object], device: str) -> int:
    """The bytes held at once during ``run``: allocated by torch on a GPU, resident in the process on a CPU."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak VmHWM restarts from what is held now
    run()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def machine() -> dict[str, object]:
    """GPU or processor, threads, version of torch and load."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else ", ".join(names[:1]),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def table(results: dict) -> str:
    """Everything that was measured as text."""
    where = results["machine"]
    head = (
        f"{where['device']}, {where['threads']} threads of {where['cores']} cores ({where['instructions']}), "
        f"torch {where['torch']}, load at the start {where['load']}"
    )
    lines = [[x["what"], x["unit"], *in_words(x), *in_words(x.get("to_stock"))] for x in results["rows"]]
    columns = ("", "", "median", "quartiles", "to stock", "quartiles")
    return f"{head}\n{results['case']}\n\n{tabulate(lines, columns, disable_numparse=True)}\n"


def in_words(found: dict[str, float] | None) -> tuple[str, str]:
    """The median, and the quartiles if they differ."""
    if found is None:
        return "", ""
    quartiles = f"{found['q1']:.5g} to {found['q3']:.5g}" if found["q1"] < found["q3"] else ""
    return f"{found['median']:.5g}", quartiles


def argument_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description="Measures what RePr costs beside stock Detectron2, without data.")
    parser.add_argument("--config-file", default="repr_r50_fpn.yaml", help="repr_r50_fpn.yaml")
    parser.add_argument("--size", help="of the images: 320 or 800x1333 (320; on a GPU the largest of INPUT)")
    parser.add_argument("--batch", type=int, default=2, help="images in a step (2)")
    parser.add_argument("--heads", choices=sorted(HEADS), help="small or stock (small; on a GPU stock)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--pairs", type=int, default=30, help="rounds of one step of every arm (30)")
    parser.add_argument("--repeats", type=int, default=3, help="drops and restores (3)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall, or cpu seconds of the process (wall)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    parser.add_argument("--output", default="output/benchmark", help="folder for benchmark.json and benchmark.txt")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config options; after -- behind --only")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, CfgNode, tuple[int, int]]:
    """The arguments, the config and the size of the images.

    Raises:
        UserError: a value is wrong.
    """
    args = argument_parser().parse_intermixed_args(argv)
    for name in ("batch", "pairs", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is 'cuda' but torch sees no GPU: use cpu")
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise UserError(f"--output {args.output!r} is a file, not a folder")
    args.heads = args.heads or ("small" if args.device == "cpu" else "stock")
    keys = [*SYNTHETIC.split(), *HEADS[args.heads].split(), "MODEL.DEVICE", args.device]
    keys += ["SOLVER.IMS_PER_BATCH", str(args.batch), "OUTPUT_DIR", args.output]
    cfg = build_config(args.config_file, [*keys, *args.opts])
    if cfg.SOLVER.AMP.ENABLED and args.device == "cpu":
        raise UserError("SOLVER.AMP.ENABLED needs --device cuda in Detectron2, got --device cpu")
    stock_size = f"{max(cfg.INPUT.MIN_SIZE_TRAIN)}x{cfg.INPUT.MAX_SIZE_TRAIN}"
    args.size = args.size or ("320" if args.device == "cpu" else stock_size)
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", args.size)
    size = (int(sides[1]), int(sides[2] or sides[1])) if sides else (0, 0)
    if min(size) < 64:
        raise UserError(
            f"--size must be a side or HEIGHTxWIDTH, such as 320 or 800x1333, of 64 or more, got {args.size!r}"
        )
    return args, cfg, size


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it and all numbers."""
    args, cfg, size = parse(argv)
    torch.set_num_threads(args.threads)
    name = " ".join([args.config_file, *args.opts])
    case = f"{name}: {args.heads} heads, {args.batch} x {size[0]} x {size[1]} px, {args.clock} clock"
    results: dict[str, Any] = {"case": case, "machine": machine(), "rows": []}
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    for rows in measure(cfg, size, args):
        results["rows"] += rows
        (folder / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "benchmark.txt").write_text(table(results))
    print(f"\n{table(results)}\nwritten to {folder}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        argument_parser().exit(2, f"benchmark.py: error: {error}\n")
