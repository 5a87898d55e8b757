"""``repr-det COMMAND``. Studies are named, not imported."""

import argparse
import pkgutil
import sys
from collections.abc import Sequence

import repr_det

_TOOL = "repr_det.commands.processes:run_tool"
# Command -> what it does, its function, and what runs that and reports its errors.
_COMMANDS = {
    "train": ("a detector with RePr, or its baseline", "repr_det.commands.train:start", _TOOL),
    "compare": (
        "RePr and its baseline over several seeds",
        "repr_det.studies.comparison.command:main",
        "repr_det.studies.comparison.runner:run_comparison_tool",
    ),
    "analyze": ("how much the filters of a checkpoint overlap", "repr_det.studies.analysis:main", _TOOL),
}
_INSTALLED_BY = dict.fromkeys(("jinja2", "matplotlib", "pandas", "tabulate"), "pip install 'repr_det[studies]'")
_INSTALLED_BY |= dict.fromkeys(
    ("detectron2", "fvcore"), "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; wrong input ends it with one line on stderr and status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("repr-det", epilog="repr-det COMMAND --help says more.")
    parser.add_argument("--version", action="version", version=f"repr_det {repr_det.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (meaning, *_) in _COMMANDS.items():
        commands.add_parser(name, help=meaning)
    if words[:1] == ["benchmark"]:
        parser.exit(2, "repr-det: error: benchmark is a program of the source tree: python tools/benchmark.py --help\n")
    command = parser.parse_args(words[:1]).command
    sys.argv = [f"repr-det {command}", *words[1:]]
    try:
        start, run = map(pkgutil.resolve_name, _COMMANDS[command][1:])
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "repr_det"):
            raise
        how = _INSTALLED_BY.get(missing, f"pip install {missing}")
        parser.exit(2, f"repr-det: error: repr-det {command} needs {missing}: {how}\n")
    run(start)
