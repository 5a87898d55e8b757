"""The command tools/analyze_filters.py: from a checkpoint to a table of overlaps, a file and a plot."""

import argparse
from pathlib import Path
from types import SimpleNamespace

from detectron2.data import build_detection_train_loader

from repr_det.commands.arguments import add_data_argument, build_config
from repr_det.commands.data_checks import check_datasets
from repr_det.detectron.hook import training_passes
from repr_det.method.errors import UserError
from repr_det.studies.analysis import NOT_FILTERS, analyze, layers_by_pattern, model_by_config, read_checkpoint
from repr_det.studies.analysis_output import as_table, describe_state, plot, write_json

_DESCRIPTION = """Shows how much the filters of a checkpoint overlap, and which ones RePr would drop.

Trains nothing, needs no GPU.

tools/analyze_filters.py CHECKPOINT [--config-file FILE [--batches 2]] [--criterion ortho] [--json FILE] [--plot FILE]

CHECKPOINT is a .pth of a training or .pkl weights of Detectron2. With a config file the layers are those that
REPR.LAYERS names in its model; without one they are all 4-D weights, narrowed by --include and --exclude, and count as
ungrouped. With --batches, training batches of DATASETS.TRAIN find the filters that are idle: no output above 0 and no
gradient, as behind a ReLU that never opens, which the weights do not show.
"""


def main(argv: list[str] | None = None) -> None:
    """Parses arguments, then reads the checkpoint and shows it."""
    args = argument_parser().parse_intermixed_args(argv)
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{name} {path}: the folder {path.parent} does not exist")
    if args.batches < 0:
        raise UserError(f"--batches must be at least 0, got {args.batches}")
    checkpoint = read_checkpoint(args.checkpoint)
    passes = None
    criterion, ratio, cap = "ortho", 0.3, 0.5
    if args.config_file:
        if args.include or args.exclude:
            raise UserError(
                "--include and --exclude go without --config-file; with it, set REPR.LAYERS.INCLUDE, EXCLUDE"
            )
        cfg = build_config(args.config_file, args.opts, args.register)
        cfg.defrost()
        cfg.DATASETS.TEST = ()  # nothing is evaluated, and what would be need not be there
        cfg.freeze()
        criterion, ratio, cap = cfg.REPR.CRITERION, cfg.REPR.DROP_RATIO, cfg.REPR.MAX_DROP_PER_LAYER
        if args.batches:
            check_datasets(cfg)
        model, layers = model_by_config(checkpoint, cfg)
        if args.batches:
            loader = SimpleNamespace(build_train_loader=build_detection_train_loader)
            passes = training_passes(cfg, model, loader)
    else:
        for what, given in (
            (f"--batches {args.batches} needs", args.batches),
            (f"--register {' '.join(args.register[0]) if args.register else ''} needs", args.register),
            (f"config options {' '.join(args.opts)} need", args.opts),
        ):
            if given:
                raise UserError(f"{what} --config-file")
        layers = layers_by_pattern(checkpoint, args.include or ("*",), args.exclude or NOT_FILTERS)
    analysis = analyze(
        layers,
        criterion if args.criterion is None else args.criterion,
        ratio if args.drop_ratio is None else args.drop_ratio,
        cap if args.max_drop_per_layer is None else args.max_drop_per_layer,
        args.pairs,
        passes=passes,
        num_batches=args.batches,
    )
    print(f"{checkpoint.path}: {describe_state(checkpoint, analysis)}\n\n{as_table(analysis)}")
    if args.json:
        write_json(args.json, checkpoint, analysis)
    if args.plot:
        plot(args.plot, checkpoint, analysis)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--config-file", help="of the run that wrote the checkpoint")
    parser.add_argument("--include", nargs="+", metavar="PATTERN", help="fnmatch patterns on weight names (default *)")
    parser.add_argument(
        "--exclude", nargs="+", metavar="PATTERN", help=f"fnmatch patterns (default {' '.join(NOT_FILTERS)})"
    )
    add_data_argument(parser)
    parser.add_argument("--batches", type=int, default=0, help="how many training batches to run (0: weights alone)")
    parser.add_argument("--criterion", help="default REPR.CRITERION, or ortho; some need --batches")
    parser.add_argument("--drop-ratio", type=float, help="default REPR.DROP_RATIO, or 0.3")
    parser.add_argument("--max-drop-per-layer", type=float, help="default REPR.MAX_DROP_PER_LAYER, or 0.5")
    parser.add_argument("--pairs", type=int, default=10, help="how many of the most overlapping pairs (default 10)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--plot", type=Path, help="write the plot to this .svg or .png file")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config options, after -- where they follow a list"
    )
    return parser
