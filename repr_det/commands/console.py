"""``repr-det COMMAND``: for an installed package, what tools/ is in a checkout. Studies are named, not imported."""

import pkgutil
import sys
from collections.abc import Sequence
from typing import NoReturn

import repr_det

_TOOL = "repr_det.commands.processes:run_tool"
# Command -> its function, what runs it and reports its errors, what it does.
_COMMANDS = {
    "train": (
        "repr_det.commands.train:start",
        _TOOL,
        "train a detector with RePr, or its baseline, and evaluate it",
    ),
    "compare": (
        "repr_det.studies.comparison.command:main",
        "repr_det.studies.comparison.runner:run_comparison_tool",
        "RePr and its baseline over several seeds, and a report",
    ),
    "analyze": ("repr_det.studies.analysis:main", _TOOL, "how much the filters of a checkpoint overlap"),
}
_INSTALLED_BY = dict.fromkeys(("jinja2", "matplotlib", "pandas", "tabulate"), "pip install 'repr_det[studies]'")
_INSTALLED_BY |= dict.fromkeys(
    ("detectron2", "fvcore"), "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
)
_USAGE = "usage: repr-det COMMAND ...\n\n" + "\n".join(f"  {name:10} {x[-1]}" for name, x in _COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; what the user gave wrong ends it with one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        print(f"{_USAGE}\n\nrepr-det COMMAND --help says more.")
        return
    if command == "--version":
        print(f"repr_det {repr_det.__version__}")
        return
    if command == "benchmark":
        _stop("repr-det benchmark is a program of the source tree now: python tools/benchmark.py --help")
    if command not in _COMMANDS:
        _stop(f"{command!r} is no command" if command else "a command is missing", _USAGE)
    sys.argv = [f"repr-det {command}", *arguments[1:]]
    try:
        start, run = map(pkgutil.resolve_name, _COMMANDS[command][:2])
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "repr_det"):
            raise
        _stop(f"repr-det {command} needs {missing}: {_INSTALLED_BY.get(missing, f'pip install {missing}')}")
    run(start)


def _stop(*lines: str) -> NoReturn:
    sys.stderr.write("repr-det: error: " + "\n".join(lines) + "\n")
    sys.exit(2)
