"""The arguments of a training run, and the config that they stand for."""

import argparse
import os
import re

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from repr_det.commands.config_files import merge_config_file, naming_close_keys
from repr_det.commands.data import classes_of_run, register_data
from repr_det.commands.shipped import config_path
from repr_det.commands.world import add_process_arguments
from repr_det.detectron.config import add_repr_config, as_user_error
from repr_det.method.errors import UserError
from repr_det.runs.checkpoints import find_checkpoint


def train_argument_parser() -> argparse.ArgumentParser:
    """Stock Detectron2's arguments and this package's."""
    parser = default_argument_parser()
    parser.description = "Train a Detectron2 detector with RePr, or its baseline, and evaluate it with COCO AP."
    add_data_argument(parser)
    add_process_arguments(parser)
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
    register: list[list[str]] | None = None,
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
    config_file = config_path(config_file)
    if len(opts) % 2:
        raise UserError(f"options after the flags must be KEY VALUE pairs, got {len(opts)} words: {' '.join(opts)}")
    merge_config_file(cfg, config_file)
    with naming_close_keys(cfg), as_user_error("command line"):
        cfg.merge_from_list(opts)
    given = set(opts[::2])
    cfg.OUTPUT_DIR = output_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    if baseline:
        cfg.REPR.ENABLED = False
        if "OUTPUT_DIR" not in given:
            cfg.OUTPUT_DIR = cfg.OUTPUT_DIR.rstrip("/") + "_baseline"
    register = register or []
    register_data(register, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, eval_only)
    folder = folder_of_checkpoint(cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, resume)
    classes = classes_of_run(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, eval_only, folder)
    if register and classes:
        for key in ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"):
            if key not in given:
                cfg.merge_from_list([key, len(classes)])
    cfg.freeze()
    return cfg


def folder_of_checkpoint(output_dir: str, weights: str, resume: bool) -> str:
    """Returns the folder of the checkpoint that a run begins with."""
    return output_dir if resume and find_checkpoint(output_dir) else os.path.dirname(weights)


def output_folder(folder: str, key: str) -> str:
    """``folder`` with ~ and variables of the environment in it put in.

    Raises:
        UserError: a variable is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(folder))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UserError(f"{key} {folder!r}: the variable {unset.group(1).strip('{}')} is not set in the environment")
    return expanded
