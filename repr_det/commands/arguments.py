"""The arguments of a training run, and the config that they stand for."""

import argparse
import os
import re
from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.engine.launch import DEFAULT_TIMEOUT

from repr_det.commands.config_files import config_path, merge_config_file, naming_close_keys
from repr_det.commands.data import classes_of_run, register_data
from repr_det.detectron.config import add_repr_config, as_user_error
from repr_det.method.errors import UserError
from repr_det.runs.checkpoints import find_checkpoint


def train_argument_parser() -> argparse.ArgumentParser:
    """Stock Detectron2's arguments and this package's."""
    parser = default_argument_parser()
    parser.description = "Train a Detectron2 detector with RePr, or its baseline, and evaluate it with COCO AP."
    add_data_argument(parser)
    parser.add_argument(
        "--rendezvous-timeout",
        type=float,
        default=DEFAULT_TIMEOUT.total_seconds(),
        metavar="SECONDS",
        help="how long the processes of a run wait for each other, at its start and in every step (default "
        "%(default).0f)",
    )
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="the same run with RePr off; OUTPUT_DIR gets the suffix _baseline unless it is given on the command line",
    )
    parser.add_argument(
        "--check-gradients",
        action="store_true",
        help="look for infinite and NaN gradients after every step on a GPU as well, where it makes the host wait; "
        "weights are looked at before every checkpoint in any case",
    )
    parser.add_argument(
        "--wandb", default="", metavar="PROJECT", help="log the training to this project of Weights & Biases as well"
    )
    return parser


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --register."""
    parser.add_argument(
        "--register",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGE_ROOT"),
        help="register COCO-format data under NAME (repeatable); NUM_CLASSES follows from it unless given in opts",
    )


def build_config(
    config_file: str,
    opts: list[str],
    register: Sequence[Sequence[str]] = (),
    baseline: bool = False,
    eval_only: bool = False,
    resume: bool = False,
) -> CfgNode:
    """The frozen config of a run.

    Args:
        config_file: a yaml file with or without the node REPR, or the name of one of configs/.
        opts: KEY VALUE pairs as on the command line.
        register: NAME, JSON, IMAGE_ROOT of COCO-format data sets.
        baseline: switch RePr off, see ``train_argument_parser``.
        eval_only, resume: nothing is trained, a checkpoint in OUTPUT_DIR comes first: what the classes follow from.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, a value has the wrong type, a data set is bad.
    """
    cfg = get_cfg()
    add_repr_config(cfg)
    if len(opts) % 2:
        raise UserError(f"options after the flags must be KEY VALUE pairs, got {len(opts)} words: {' '.join(opts)}")
    merge_config_file(cfg, config_path(config_file))
    with naming_close_keys(cfg), as_user_error("command line"):
        cfg.merge_from_list(opts)
    given = set(opts[::2])
    cfg.OUTPUT_DIR = output_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR", baseline and "OUTPUT_DIR" not in given)
    if baseline:
        cfg.REPR.ENABLED = False
    data = (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    classes = classes_of_data(register, *data, eval_only, resume, cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS)
    for key in ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"):
        if classes and key not in given:
            cfg.merge_from_list([key, classes])
    cfg.freeze()
    return cfg


def classes_of_data(
    register: Sequence[Sequence[str]],
    train: Sequence[str],
    test: Sequence[str],
    eval_only: bool,
    resume: bool,
    output_dir: str,
    weights: str,
) -> int:
    """Registers the data of a run, numbers its classes, and returns their number; 0 if it does not follow from them."""
    register_data(register, train, test, eval_only)
    folder = output_dir if resume and find_checkpoint(output_dir) else os.path.dirname(weights)
    classes = classes_of_run(train, test, eval_only, folder)
    return len(classes or ()) if register else 0


def output_folder(folder: str, key: str, beside: bool) -> str:
    """``folder`` with ~ and variables of the environment in it put in; ``beside``: that of the baseline beside it.

    Raises:
        UserError: a variable is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(folder))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UserError(f"{key} {folder!r}: the variable {unset.group(1).strip('{}')} is not set in the environment")
    return expanded.rstrip("/") + "_baseline" if beside else expanded
