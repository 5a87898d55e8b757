"""The runs of a comparison that starts from a config, each checked before any of them trains."""

import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from repr_det.commands.arguments import build_config
from repr_det.commands.checks import check_run
from repr_det.detectron.config import scale_to_world
from repr_det.method.errors import UserError
from repr_det.runs.files import run_traces
from repr_det.studies.comparison.records import (
    BASELINE,
    REPR,
    Run,
    Study,
    check_one_test_set,
    differing_keys,
    flatten,
    is_finished,
    read_config,
    refuse_differences,
)

_OWN_KEYS = {"SEED": "--seeds", "OUTPUT_DIR": "--output", "REPR.ENABLED": "the arm"}
_TAKEN = ("difference", "sentence")  # names that results.json has beside those of the arms


def plan_study(
    config_file: str,
    seeds: Sequence[int],
    output: Path | None = None,
    register: Sequence[Sequence[str]] = (),
    opts: Sequence[str] = (),
    num_gpus: int = 1,
    evaluations: int = 0,
    against: str = "",
) -> tuple[Study, Path]:
    """Plans both arms for every seed, in folders of ``output``, ordered by seed, the reference first.

    Refuses what would stop a run before its first step, and a folder that holds another run.

    Args:
        output: by default OUTPUT_DIR of the config with the suffix _comparison; returned beside the study.
        evaluations: if TEST.EVAL_PERIOD is 0 and not in ``opts``, about so many evaluations in a run.
        against: the config of the reference; "" takes the baseline of ``config_file``.
    """
    opts, register = list(opts), [list(words) for words in register]
    for key in opts[::2]:
        if key in _OWN_KEYS:
            raise UserError(f"{key} on the command line: a comparison sets it itself, by {_OWN_KEYS[key]}")
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds must be 0 or more and differ from each other, got {' '.join(map(str, seeds))}")
    cfg = build_config(config_file, opts, register)
    if not against and not cfg.REPR.ENABLED:
        raise UserError(f"{config_file} has REPR.ENABLED False: give a config with RePr, or another one --against it")
    check_one_test_set(cfg.DATASETS.TEST)
    if cfg.TEST.EVAL_PERIOD == 0 and evaluations and "TEST.EVAL_PERIOD" not in opts[::2]:
        opts += ["TEST.EVAL_PERIOD", str(max(1, cfg.SOLVER.MAX_ITER // evaluations))]
    output = output or Path(cfg.OUTPUT_DIR.rstrip("/") + "_comparison")
    arms, files = (BASELINE, REPR), (config_file, config_file)
    if against:
        arms, files = arm_names(against, config_file), (against, config_file)
        configs = [scale_to_world(build_config(file, opts, register), num_gpus) for file in files]
        refuse_differences({file: flatten(one) for file, one in zip(files, configs, strict=True)}, shared=True)
    runs = []
    for seed in seeds:
        for arm, file in zip(arms, files, strict=True):
            folder = output / f"{arm}_seed{seed}"
            own = [*opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
            is_baseline = not against and arm == BASELINE
            own_cfg = build_config(file, own, register, is_baseline)
            max_iter = scale_to_world(own_cfg, num_gpus).SOLVER.MAX_ITER
            flags = _flags(file, is_baseline, register, num_gpus)
            runs.append(Run(arm, seed, folder, max_iter, tuple(flags), tuple(own)))
            _check_run(runs[-1], own_cfg, num_gpus)
    return Study(arms, tuple(runs), any_config=bool(against)), output


def arm_names(*config_files: str) -> tuple[str, ...]:
    """The stems of the files, with their folders' names if the stems are the same."""
    paths = [Path(file).resolve() for file in config_files]
    names = tuple(path.stem for path in paths)
    if names[0] == names[1]:
        names = tuple(f"{path.parent.name}_{path.stem}" for path in paths)
    if names[0] == names[1] or set(names) & set(_TAKEN):
        raise UserError(f"{' and '.join(config_files)} give their names to the results: rename one of the files")
    return names


def _flags(config_file: str, is_baseline: bool, register: Sequence[Sequence[str]], num_gpus: int) -> list[str]:
    flags = [sys.executable, "-m", "repr_det.train", "--config-file", config_file]
    if is_baseline:
        flags.append("--baseline")
    if num_gpus > 1:
        flags += ["--num-gpus", str(num_gpus)]
    for words in register:
        flags += ["--register", *words]
    return flags


def _check_run(run: Run, cfg: CfgNode, num_gpus: int) -> None:
    """Refuses what would stop the run before its first step, and a folder that holds another run."""
    if (run.folder / "config.yaml").exists():
        held, wanted = flatten(read_config(run.folder)), flatten(cfg)
        free = ("OUTPUT_DIR",) if cfg.REPR.ENABLED else ("OUTPUT_DIR", "REPR.")
        for key in differing_keys(held, wanted, free):
            raise UserError(
                f"{run.folder} holds a run with {key} {held.get(key)}, but this comparison has {wanted.get(key)}: give "
                "another --output, or remove that folder"
            )
    if not is_finished(run):
        check_run(cfg, resume=bool(run_traces(run.folder)), num_gpus=num_gpus)
