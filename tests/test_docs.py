"""Every command that README and docs show is one that its program takes; the snippets of the own-loop page run."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import benchmark
import cifar10
import digits
import pytest
import torch
from conftest import ROOT
from detectron2.config import get_cfg
from torch import nn

from repr_det import add_repr_config
from repr_det.commands.arguments import train_argument_parser
from repr_det.commands.shipped import config_path
from repr_det.detectron.config import markdown_table
from repr_det.method.options import CONFIG_KEYS
from repr_det.studies.analysis import argument_parser as analysis_argument_parser
from repr_det.studies.comparison.command import argument_parser as comparison_argument_parser

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"(\S*bin/)?(python|torchrun|pip|make|sbatch|bash|repr-det)$|tools/|examples/")
PARSERS = {
    "tools/train_net.py": lambda words: train_argument_parser().parse_args(words),
    "tools/lazyconfig_train_net.py": lambda words: train_argument_parser().parse_args(words),
    "tools/compare.py": lambda words: comparison_argument_parser().parse_args(words),
    "tools/analyze_filters.py": lambda words: analysis_argument_parser().parse_intermixed_args(words),
    "tools/benchmark.py": lambda words: benchmark.argument_parser().parse_intermixed_args(words),
    "examples/cifar10.py": cifar10.parse,
    "docs/evidence/digits.py": digits.parse,
}
COMMANDS = {"train": "tools/train_net.py", "compare": "tools/compare.py", "analyze": "tools/analyze_filters.py"}
# Options of torchrun that take a value, as far as the docs use them.
TORCHRUN = ("--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id")


def code_lines(page: Path) -> Iterator[str]:
    """The lines of indented and fenced blocks, those that end in a backslash joined."""
    lines, fenced = iter(page.read_text().splitlines()), False
    for line in lines:
        fenced ^= line.startswith("```")
        if fenced or line.startswith("    "):
            while line.endswith("\\"):
                line = line[:-1] + next(lines).strip()
            yield line.strip()


def alternatives(command: str) -> Iterator[str]:
    """``a [b | c]`` stands for "a", "a b" and "a c"."""
    found = re.search(r"\[([^\[\]']*)\]", command)
    if found is None:
        yield command
        return
    for choice in ("", *found[1].split("|")):
        yield from alternatives(command[: found.start()] + choice + command[found.end() :])


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for line in code_lines(page):
            if PROGRAM.match(line.split(" ")[0]):
                found += [(page.name, one) for one in alternatives(line)]
    return list(dict.fromkeys(found))


def check_options(program: str, words: list[str]) -> None:
    """``words`` as the program itself reads them, the config that they name and the keys that they change."""
    if any(word.endswith(".py") for word in words) and program == "tools/train_net.py":
        program = "tools/lazyconfig_train_net.py"
    args = PARSERS[program](words)
    file = getattr(args, "config_file", None)
    if file:
        path = config_path(file)
        assert Path(path).is_file()
        if path.endswith(".yaml"):
            cfg = get_cfg()
            add_repr_config(cfg)
            cfg.merge_from_file(path)
            cfg.merge_from_list(getattr(args, "opts", None) or [])


def test_there_are_commands_of_every_kind():
    words = {command.split(" ")[0].rpartition("/")[2] for _, command in commands()}
    assert {"make", "pip", "python", "torchrun", "repr-det", "sbatch"} <= words and len(commands()) > 50


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_shown_command_is_one_that_its_program_takes(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    placeholders = ("...", "KEY", "VALUE")
    words = [word for word in shlex.split(command, comments=True) if word not in placeholders]
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[-1] == "--config-file":  # what followed was a placeholder
        words.pop()
    program, words = words[0].rpartition("/")[2], words[1:]
    if program == "torchrun":
        while words[0].startswith("--"):
            words = words[2 if words[0] in TORCHRUN else 1 :]
        program = "python"
    if program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in words)
    elif program == "repr-det":
        check_options(COMMANDS[words[0]], words[1:])
    elif program == "sbatch":
        assert (ROOT / words[0]).is_file()
        check_options("tools/train_net.py", words[1:])
    elif program == "python" and words[:2] == ["-m", "pytest"]:
        files = [word for word in words[2:] if "/" in word]
        assert files and all((ROOT / file).is_file() for file in files)
    elif program == "python" and words[0] in PARSERS:
        check_options(words[0], words[1:])
    elif program == "python":
        assert words[0] == "-m" or (ROOT / words[0]).is_file()
    elif program == "pip":
        assert words[0] in ("install", "wheel")
    else:
        raise AssertionError(f"{page}: nobody looks at {command!r}")


def test_the_table_of_keys_is_that_of_the_options():
    page = (ROOT / "docs" / "configs.md").read_text()
    table = page.partition("<!-- keys of REPR -->\n\n")[2].partition("\n\n<!-- end of the keys -->")[0]
    assert table == markdown_table(), "put what repr_det.detectron.config.markdown_table() returns into docs/configs.md"
    rows = [line.split("|")[1].strip() for line in table.splitlines()[3:]]
    assert rows == [f"`{key}`" for key in CONFIG_KEYS.values()]


def test_plain_pytorch_snippet_runs():
    page = (ROOT / "docs" / "own_loop.md").read_text()
    block = re.search(r"## Plain PyTorch\n\n((?:    .*\n|\n)+)", page)[1]
    model = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = {"model": model, "optimizer": optimizer, "total_steps": 24, "batches": torch.randn(24, 2, 3, 8, 8)}
    exec(textwrap.dedent(block).replace("... ", "model['backbone'](batch).square().mean().backward()"), names)
    assert names["repr_training"].phase == "full" and names["repr_training"].scheme.cycle == 3


def test_detectron2_snippet_runs(tiny_cfg):
    page = (ROOT / "docs" / "own_loop.md").read_text()
    section = page.partition("## A Detectron2 trainer\n")[2].partition("\n## ")[0]
    block = "\n".join(line for line in section.splitlines() if line.startswith("    "))
    hooks = []

    class Registers:
        def register_hooks(self, found):
            hooks.extend(found)

    block = block.replace("add_repr_config(cfg)  ", "pass  ")  # tiny_cfg has the node and values in it
    exec(textwrap.dedent(block), {"cfg": tiny_cfg("REPR.ENABLED", "True"), "trainer": Registers()})
    plain, configured = hooks
    assert plain.options.resumed() == configured.options.resumed()
