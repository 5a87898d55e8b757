"""The arguments of a training run, and its config."""

import argparse
import contextlib
import difflib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.engine.launch import DEFAULT_TIMEOUT

from repr_det.commands.data import prepare_data
from repr_det.detectron.config import add_repr_config, as_user_error
from repr_det.method.errors import UserError
from repr_det.runs.checkpoints import find_checkpoint

logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = _PACKAGE / "configs"  # in a wheel
if not CONFIGS.is_dir():
    CONFIGS = _PACKAGE.parent / "configs"
_ARITHMETIC = re.compile(r"(for|in|x|[\d\s.,*/+()\[\]-])*")


def train_argument_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")  # Detectron2's: one port for all runs of a user
    parser.description = "Train a detector with RePr, or its baseline, and evaluate it with COCO AP."
    add_data_argument(parser)
    parser.add_argument(
        "--rendezvous-timeout",
        type=float,
        default=DEFAULT_TIMEOUT.total_seconds(),
        metavar="SECONDS",
        help="how long processes wait for each other (default %(default).0f)",
    )
    parser.add_argument(
        "--baseline", action="store_true", help="RePr off; OUTPUT_DIR, unless given here, gets the suffix _baseline"
    )
    parser.add_argument(
        "--check-gradients",
        action="store_true",
        help="look for infinite and NaN gradients on a GPU too, which waits for every step",
    )
    parser.add_argument("--wandb", default="", metavar="PROJECT", help="log to this project of Weights & Biases too")
    return parser


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--register",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGE_ROOT"),
        help="register COCO-format data as NAME (repeatable); sets NUM_CLASSES unless opts give it",
    )


def refuse_below(args: argparse.Namespace, **least: int) -> None:
    """Raises UserError for an argument below its least value."""
    for name, number in least.items():
        if getattr(args, name) < number:
            raise UserError(f"--{name.replace('_', '-')} must be at least {number}, got {getattr(args, name)}")


def build_config(
    config_file: str,
    opts: list[str],
    register: Sequence[Sequence[str]] = (),
    baseline: bool = False,
    eval_only: bool = False,
    resume: bool = False,
) -> CfgNode:
    """Builds the frozen config of a run from a yaml file or the name of one in configs/. Other arguments are those of
    the command line. UserError if file, key, value or data set is wrong."""
    cfg = get_cfg()
    add_repr_config(cfg)
    if len(opts) % 2:
        raise UserError(f"options after the flags must be KEY VALUE pairs, got {' '.join(opts)}")
    merge_config_file(cfg, config_path(config_file))
    with naming_close_keys(cfg), as_user_error("command line"):
        cfg.merge_from_list(opts)
    given = set(opts[::2])
    cfg.OUTPUT_DIR = output_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR", baseline and "OUTPUT_DIR" not in given)
    if baseline:
        cfg.REPR.ENABLED = False
    weights = cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, resume, "MODEL.WEIGHTS" in given
    evaluated = weights_to_evaluate(*weights) if eval_only else None
    classes = prepare_data(register, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, evaluated)
    for key in ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"):
        if classes and key not in given:
            cfg.merge_from_list([key, classes])
    cfg.freeze()
    return cfg


def weights_to_evaluate(output_dir: str, weights: str, resume: bool, given: bool) -> str:
    """The file that --eval-only evaluates; a warning if it is not the one ``given``."""
    found = find_checkpoint(output_dir) if resume else None
    if found and given:
        logger.warning("--resume evaluates the checkpoint in %s, not %r", output_dir, weights)
    return str(found or weights)


def output_folder(folder: str, key: str, beside: bool) -> str:
    """Replaces ~ and variables in a folder (UserError if one is not set); ``beside`` adds the baseline's suffix."""
    expanded = os.path.expandvars(os.path.expanduser(folder))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UserError(f"{key} {folder!r}: the variable {unset.group(1).strip('{}')} is not set")
    return expanded.rstrip("/") + "_baseline" if beside else expanded


def config_path(name: str) -> str:
    """The path of a config file, by its path or the name of a shipped one; UserError if there is none."""
    for path in (name, os.path.join(CONFIGS, name)):
        if os.path.isfile(path):
            return path
    if not name:
        raise UserError("--config-file is missing")
    shipped = [str(path.relative_to(CONFIGS)) for path in (*CONFIGS.glob("*.yaml"), *CONFIGS.glob("lazy/*.py"))]
    listed = ", ".join(sorted(shipped))
    raise UserError(f"--config-file {name!r} is not a file, nor the name of a shipped config: {listed}")


def merge_config_file(cfg: CfgNode, file: str) -> None:
    """``cfg.merge_from_file``; UserError if the file is wrong, or runs code other than arithmetic (Base-RetinaNet)."""
    with naming_close_keys(cfg), as_user_error(file):
        try:
            _Checked.load_yaml_with_base(file)
        except RecursionError:
            raise UserError(f"{file}: _BASE_ builds on this file again") from None
        cfg.merge_from_file(file)


@contextlib.contextmanager
def naming_close_keys(cfg: CfgNode) -> Iterator[None]:
    """Adds the closest keys of ``cfg`` to the UserError of an unknown key."""
    try:
        yield
    except UserError as error:
        unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", str(error))
        known = {key.lower(): key for key in _keys(cfg)}
        close = difflib.get_close_matches(unknown.group(1).lower(), known, n=2) if unknown else []
        hint = f": did you mean {' or '.join(known[key] for key in close)}?" if close else ""
        raise UserError(f"{error}{hint}") from error


def _keys(node: CfgNode, path: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{path}{key}"
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{path}{key}.")


class _Checked(CfgNode):
    """Checks every file that Detectron2 opens, those of _BASE_ too."""

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        with super()._open_cfg(filename) as opened:
            text = opened.read()
            if filename.endswith(".py") or (re.search(r"^dataloader:$", text, re.M) and "_target_:" in text):
                raise UserError(f"{filename}: is a LazyConfig's: train takes its .py file, other commands yaml configs")
            opened.seek(0)
            content = yaml.load(opened, _Loader)  # its errors name the file
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            found = "nothing" if content is None else str(content)[:40]
            raise UserError(f"{filename}: must hold config keys with their values (MODEL: ...), got {found}")
        for key, value in content.items():
            if value is None:
                raise UserError(f"{filename}: {key} is empty: give what belongs to it, or leave it out")
        return io.StringIO(yaml.safe_dump(content))


class _Loader(yaml.SafeLoader):
    """Refuses code other than arithmetic, and a key given twice, of which yaml takes the last."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]} stands there twice, put both blocks together", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def arithmetic(self, node: yaml.Node) -> list[str]:
        texts = self.construct_sequence(node)
        for text in texts:
            if not _ARITHMETIC.fullmatch(str(text)):
                raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not arithmetic", node.start_mark)
        return texts


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _Loader.arithmetic)
