"""What the command-line tools share: arguments, the config they stand for, and every check before the first step."""

import argparse
import contextlib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Detectron2 of 2024 under a current torch warns at every start about what its users cannot change.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|detectron2|fvcore)\.")
warnings.filterwarnings("ignore", message=r"(?s).*(pkg_resources|torch\.meshgrid|broadcast_buffers).*")

import torch
import torch.distributed as dist
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from repr_det.config import add_repr_config, schedule_from_config, validate_repr_config, without_repr
from repr_det.criteria import get_criterion
from repr_det.datasets import check_registered, class_names, register_builtin, register_coco_format
from repr_det.errors import UserError
from repr_det.files import disk_is_full, run_traces, write_atomically
from repr_det.layers import find_filter_layers
from repr_det.resume import check_last_checkpoint
from repr_det.safe_pickle import load_checkpoint
from repr_det.selection import check_capacity

STOCK_CONFIG_FILE = "config_detectron2.yaml"


def train_argument_parser() -> argparse.ArgumentParser:
    """Stock Detectron2's arguments plus --baseline and --register."""
    parser = default_argument_parser()
    parser.description = "Train a Detectron2 detector with RePr, or its baseline, and evaluate it with COCO AP."
    add_data_argument(parser)
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="the same run with RePr off; OUTPUT_DIR gets the suffix _baseline unless it is given on the command line",
    )
    return parser


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--register",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGE_ROOT"),
        help="register COCO-format data under NAME (repeatable); NUM_CLASSES follows from it unless given in opts",
    )


def run_tool(main: Callable[[], Any]) -> None:
    """Runs a tool; a UserError or a full disk ends it with one line on stderr and status 2."""
    try:
        main()
        return
    except UserError as error:
        what = _last_line(error)
    except OSError as error:
        if not disk_is_full(error):
            raise
        what = f"{error}: free space; a run goes on with --resume"
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {what}\n")
    sys.exit(2)


def build_config(
    config_file: str, opts: list[str], register: list[list[str]] | None = None, baseline: bool = False
) -> CfgNode:
    """The frozen config of a run.

    Args:
        config_file: a yaml file with or without the node REPR.
        opts: KEY VALUE pairs as on the command line.
        register: NAME, JSON, IMAGE_ROOT of COCO-format data sets.
        baseline: switch RePr off, see ``train_argument_parser``.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, a value has the wrong type, a data set is bad.
    """
    cfg = get_cfg()
    add_repr_config(cfg)
    if not os.path.isfile(config_file):
        raise UserError(f"--config-file {config_file!r} is not a file" if config_file else "--config-file is missing")
    if len(opts) % 2:
        raise UserError(f"options after the flags must be KEY VALUE pairs, got {len(opts)} words: {' '.join(opts)}")
    with as_user_error(config_file):
        cfg.merge_from_file(config_file)
    with as_user_error("command line"):
        cfg.merge_from_list(opts)
    register_builtin()
    for name, json_file, image_root in register or []:
        register_coco_format(name, json_file, image_root)
    given = set(opts[::2])
    names = {name for name, *_ in register or []}
    trained = [name for name in cfg.DATASETS.TRAIN if name in names]
    if trained:
        for key in ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"):
            if key not in given:
                cfg.merge_from_list([key, len(class_names(trained[0]))])
    if baseline:
        cfg.REPR.ENABLED = False
        if "OUTPUT_DIR" not in given:
            cfg.OUTPUT_DIR = cfg.OUTPUT_DIR.rstrip("/") + "_baseline"
    cfg.freeze()
    return cfg


def check_run(cfg: CfgNode, resume: bool = False, eval_only: bool = False, num_gpus: int = 1) -> None:
    """Everything that can be known to be wrong before a model is built or a file written.

    Raises:
        UserError: naming the key, file or folder.
    """
    _check_device(cfg, num_gpus)
    if not eval_only:
        validate_repr_config(cfg)
        check_output_folder(cfg, resume)
    check_datasets(cfg, eval_only)
    if cfg.REPR.ENABLED and not eval_only:
        check_layers(cfg)
    _check_weights(cfg)


def check_layers(cfg: CfgNode) -> None:
    """REPR.LAYERS matches trainable convs that RePr can handle, few enough for REPR.CRITERION, and the caps leave room
    for REPR.DROP_RATIO."""
    shapes_only = cfg.clone()
    shapes_only.defrost()
    shapes_only.MODEL.DEVICE = "meta"
    with as_user_error("MODEL"), torch.device("meta"):
        model = build_model(shapes_only)
    layers = find_filter_layers(model, cfg.REPR.LAYERS.INCLUDE, cfg.REPR.LAYERS.EXCLUDE)
    sizes = {layer.name: layer.num_filters for layer in layers}
    check_capacity(sizes, cfg.REPR.DROP_RATIO, cfg.REPR.MAX_DROP_PER_LAYER)
    get_criterion(cfg.REPR.CRITERION, sum(sizes.values()))


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """Every data set of the run exists, is well formed and has no more classes than the model."""
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name at least one registered data set")
    if eval_only and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name at least one registered data set")
    retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    key = "MODEL.RETINANET.NUM_CLASSES" if retina else "MODEL.ROI_HEADS.NUM_CLASSES"
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES if retina else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        check_registered(name)
        if len(class_names(name)) != num_classes:
            raise UserError(f"{key} is {num_classes}, but {name} has {len(class_names(name))} classes: set it to that")


def check_output_folder(cfg: CfgNode, resume: bool) -> None:
    """A new run gets a folder without another run's files; a resumed one the folder of the same run."""
    folder = Path(cfg.OUTPUT_DIR)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"OUTPUT_DIR {folder} is a file, not a folder")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"OUTPUT_DIR {folder} cannot be made: {parent} is a file")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:  # read-only, full, a file system without room for files
        raise UserError(f"OUTPUT_DIR {folder} cannot be written ({error.strerror}): give another folder") from error
    traces = run_traces(folder)
    if not traces:
        return
    if not resume:
        raise UserError(
            f"OUTPUT_DIR {folder} holds another run ({', '.join(traces[:3])}): add --resume to continue it, or "
            "give another OUTPUT_DIR"
        )
    saved = folder / "config.yaml"
    if saved.exists():
        _check_same_run(cfg, saved)
    check_last_checkpoint(str(folder))


def _check_same_run(cfg: CfgNode, saved: Path) -> None:
    old = get_cfg()
    add_repr_config(old)
    try:
        with as_user_error(str(saved)):
            old.merge_from_file(str(saved))
    except UserError:
        return  # cut short by a crash; the checkpoint itself knows its schedule
    if old.REPR.ENABLED != cfg.REPR.ENABLED:
        raise UserError(
            f"OUTPUT_DIR {saved.parent} holds a run with REPR.ENABLED {old.REPR.ENABLED}, this one has "
            f"{cfg.REPR.ENABLED}: give another OUTPUT_DIR"
        )
    if cfg.REPR.ENABLED and schedule_from_config(old) != schedule_from_config(cfg):
        raise UserError(
            f"OUTPUT_DIR {saved.parent} holds a run with {schedule_from_config(old)}, this one has "
            f"{schedule_from_config(cfg)}: resume with the same schedule or give another OUTPUT_DIR"
        )


def setup(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Detectron2's default_setup (log files, config.yaml, seeds), and the config that stock tools can read."""
    setup_process(args, cfg, str(cfg.MODEL.DEVICE), cfg.OUTPUT_DIR)
    if comm.is_main_process() and cfg.OUTPUT_DIR:
        write_atomically(Path(cfg.OUTPUT_DIR) / STOCK_CONFIG_FILE, without_repr(cfg).dump())


def setup_process(args: argparse.Namespace, cfg: Any, device: str, folder: str) -> None:
    """Threads, logs and seeds of one process of a run, for a yaml config or a LazyConfig."""
    if device == "cpu" and comm.get_world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Every process would take all cores for itself, and they would wait for each other most of the time.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.get_local_size()))
    default_setup(cfg, args)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_one_line_for_user_errors)
    setup_logger(folder, distributed_rank=comm.get_rank(), name="repr_det", abbrev_name="repr")


def launch_processes(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, device: str) -> None:
    """Runs ``main(args)`` in the processes that ``args`` asks for."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several CPU processes talk by gloo, also on a machine with GPUs
    try:
        processes = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
        launch(_run_and_leave_the_group, *processes, args=(main, args))
    except ProcessRaisedException as error:
        if not re.search(r"\nrepr_det\.[\w.]+Error: .*$", str(error).rstrip()):
            raise
        raise UserError(_last_line(error)) from None
    except ProcessExitedException as error:
        raise UserError(f"{error}, so the run stops; what is saved is untouched: continue with --resume") from None


def _run_and_leave_the_group(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Detectron2's processes exit as members of their group, and gloo's threads then abort some of them (SIGABRT). One
    that fails does not leave: its peers may still wait for it."""
    main(args)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _last_line(error: Exception) -> str:
    """The message; of an error from another process, whose message is a traceback, the one that ends it."""
    return re.sub(r"^repr_det\.[\w.]+Error: ", "", str(error).rstrip().rpartition("\n")[2])


def _one_line_for_user_errors(record: logging.LogRecord) -> bool:
    """Detectron2 logs a traceback for whatever ends a run; what a user can act on is one line, printed by run_tool."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, UserError) or disk_is_full(error))


@contextlib.contextmanager
def as_user_error(source: str):
    """Config libraries raise KeyError, ValueError, AssertionError and yaml errors for what a user typed."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        # str() of a KeyError is the repr of its message.
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        text = " ".join((f"not valid YAML: {text}" if isinstance(error, yaml.YAMLError) else text).split())
        raise UserError(f"{source}: {text or type(error).__name__}") from error


def _check_device(cfg: CfgNode, num_gpus: int) -> None:
    if num_gpus < 1:
        raise UserError(f"--num-gpus must be at least 1, got {num_gpus}")
    device = str(cfg.MODEL.DEVICE)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE {device!r} is not a device: use cuda or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE is {device!r} but torch sees no GPU: add MODEL.DEVICE cpu to the command line")
    if kind == "cuda" and num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus {num_gpus}, but torch sees {torch.cuda.device_count()} GPU(s)")
    if cfg.SOLVER.AMP.ENABLED and kind != "cuda":
        raise UserError(f"SOLVER.AMP.ENABLED needs a GPU in Detectron2, MODEL.DEVICE is {device!r}: set it to False")
    if cfg.SOLVER.IMS_PER_BATCH % num_gpus:
        raise UserError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a multiple of --num-gpus {num_gpus}")


def _check_weights(cfg: CfgNode) -> None:
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        return
    try:
        local = PathManager.get_local_path(weights)
        found = os.path.isfile(local)
        reason = "it is not a file"
    except Exception as error:  # whatever a download handler raises, the user needs the same line
        found, reason = False, " ".join(str(error).split())
    if not found:
        raise UserError(
            f"MODEL.WEIGHTS {weights!r} cannot be read ({reason}): give the path of a local file, or MODEL.WEIGHTS '' "
            "to train from random weights"
        )
    if local.endswith((".pth", ".pkl")):
        load_checkpoint(local)
