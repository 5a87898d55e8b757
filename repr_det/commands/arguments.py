"""What a user types for a training run: the arguments, and the config that they stand for."""

import argparse

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from repr_det.commands.shipped import config_path
from repr_det.commands.world import add_process_arguments
from repr_det.datasets import class_names, register_builtin, register_coco_format
from repr_det.detectron.config import add_repr_config, as_user_error
from repr_det.method.errors import UserError


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
    config_file: str, opts: list[str], register: list[list[str]] | None = None, baseline: bool = False
) -> CfgNode:
    """The frozen config of a run.

    Args:
        config_file: a yaml file with or without the node REPR, or the name of one of configs/.
        opts: KEY VALUE pairs as on the command line.
        register: NAME, JSON, IMAGE_ROOT of COCO-format data sets.
        baseline: switch RePr off, see ``train_argument_parser``.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, a value has the wrong type, a data set is bad.
    """
    cfg = get_cfg()
    add_repr_config(cfg)
    config_file = config_path(config_file)
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
