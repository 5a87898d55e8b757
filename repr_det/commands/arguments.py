"""What a user types for a training run: the arguments, and the config that they stand for."""

import argparse
import os

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from repr_det.commands.data import classes_of_run, register_data
from repr_det.commands.shipped import CONFIGS, config_path
from repr_det.commands.world import add_process_arguments
from repr_det.detectron.config import add_repr_config, as_user_error
from repr_det.method.errors import UserError
from repr_det.runs.checkpoints import find_checkpoint


def train_argument_parser() -> argparse.ArgumentParser:
    """Stock Detectron2's arguments plus --baseline and --register."""
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
    check_config_file(config_file, cfg)
    with as_user_error(config_file):
        cfg.merge_from_file(config_file, allow_unsafe=False)
    with as_user_error("command line"):
        cfg.merge_from_list(opts)
    given = set(opts[::2])
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
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


def check_config_file(file: str, cfg: CfgNode, before: tuple[str, ...] = ()) -> None:
    """A yaml file, and those that it builds on, are mappings of keys.

    Args:
        cfg: the config with its defaults.
        before: the files that build on this one.

    Raises:
        UserError: naming the file, and what is wrong with it.
    """
    with as_user_error(file), open(file, encoding="utf-8") as stream:
        content = yaml.safe_load(stream)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        found = "nothing" if content is None else str(content)[:40]
        raise UserError(f"{file}: must hold config keys with their values (MODEL: ...), got {found}")
    for key, value in content.items():
        if value is None and isinstance(cfg.get(key), CfgNode):
            raise UserError(f"{file}: {key} is empty: give keys below it, or leave it out")
    bases = content.get("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise UserError(f"{file}: _BASE_ must be the name of a config file, got {base!r}")
        if base.startswith(("http://", "https://")):
            continue
        path = os.path.join(os.path.dirname(file), os.path.expanduser(base))
        if not os.path.isfile(path):
            shipped = CONFIGS / base
            hint = f"; the one of this name that comes with repr_det is {shipped}" if shipped.is_file() else ""
            raise UserError(f"{file}: _BASE_ {base!r} is not a file: it is looked for as {path}{hint}")
        if os.path.realpath(path) in map(os.path.realpath, (*before, file)):
            raise UserError(f"{file}: _BASE_ {base!r} builds on this file again")
        check_config_file(path, cfg, (*before, file))


def folder_of_checkpoint(output_dir: str, weights: str, resume: bool) -> str:
    """Where the checkpoint lies that a run begins with."""
    return output_dir if resume and find_checkpoint(output_dir) else os.path.dirname(weights)
