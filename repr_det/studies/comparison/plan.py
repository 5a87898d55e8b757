"""The runs of a comparison that starts from a config, each checked before any of them trains."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from repr_det.commands.arguments import build_config
from repr_det.commands.checks import check_run
from repr_det.detectron.config import scale_to_world
from repr_det.method.errors import UserError
from repr_det.runs.files import run_traces
from repr_det.studies.comparison.pairing import check_planned
from repr_det.studies.comparison.runs import BASELINE, REPR, Run, is_finished, planned_run

_OWN_KEYS = {"SEED": "--seeds", "OUTPUT_DIR": "--output", "REPR.ENABLED": "the arm"}


def plan_runs(
    config_file: str,
    seeds: Sequence[int],
    output: Path | None = None,
    register: Sequence[Sequence[str]] = (),
    opts: Sequence[str] = (),
    num_gpus: int = 1,
    evaluations: int = 0,
) -> tuple[list[Run], Path]:
    """Both arms for every seed, in folders of ``output``.

    Args:
        config_file: a config with REPR.ENABLED True.
        output: by default OUTPUT_DIR of the config with the suffix _comparison.
        opts: KEY VALUE pairs for every run.
        evaluations: where TEST.EVAL_PERIOD is 0 and not in ``opts``, about so many evaluations in a run.

    Returns:
        The runs, ordered by seed, baseline first; and the output folder.

    Raises:
        UserError: whatever would stop one of the runs before its first step, or a folder that holds another run.
    """
    opts, register = list(opts), [list(words) for words in register]
    for key in opts[::2]:
        if key in _OWN_KEYS:
            raise UserError(f"{key} on the command line: a comparison sets it itself, by {_OWN_KEYS[key]}")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds must differ from each other, got {' '.join(map(str, seeds))}")
    for seed in seeds:
        if seed < 0:
            raise UserError(f"--seeds must be 0 or more, got {seed}: a negative SEED is a random one")
    cfg = build_config(config_file, opts, register)
    if not cfg.REPR.ENABLED:
        raise UserError(f"{config_file} has REPR.ENABLED False: give the config of the RePr arm")
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(f"DATASETS.TEST must name one data set for a comparison, got {list(cfg.DATASETS.TEST)}")
    if cfg.TEST.EVAL_PERIOD == 0 and evaluations and "TEST.EVAL_PERIOD" not in opts[::2]:
        opts += ["TEST.EVAL_PERIOD", str(max(1, cfg.SOLVER.MAX_ITER // evaluations))]
    output = output or Path(cfg.OUTPUT_DIR.rstrip("/") + "_comparison")
    many = len(seeds) > 1 or evaluations
    max_iter = scale_to_world(cfg, num_gpus).SOLVER.MAX_ITER
    runs = []
    for seed in seeds:
        for arm in (BASELINE, REPR):
            folder = output / (f"{arm}_seed{seed}" if many else arm)
            run = planned_run(arm, seed, folder, max_iter, config_file, register, opts, num_gpus)
            _check(run, build_config(config_file, list(run.opts), register, arm == BASELINE), num_gpus)
            runs.append(run)
    return runs, output


def _check(run: Run, cfg: CfgNode, num_gpus: int) -> None:
    check_planned(run, yaml.safe_load(cfg.dump()))
    if not is_finished(run):
        check_run(cfg, resume=bool(run_traces(run.folder)), num_gpus=num_gpus)
