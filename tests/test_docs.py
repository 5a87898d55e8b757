"""Every command that README and docs show is one that its program takes; snippets run; links lead somewhere."""

import os
import re
import runpy
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import benchmark
import cifar10
import digits
import pytest
import setuptools
import torch
from conftest import ROOT
from detectron2.config import get_cfg
from option_table import markdown_table
from torch import nn

from repr_det import RePrHook, UserError, add_repr_config
from repr_det.commands.arguments import config_path, train_argument_parser
from repr_det.detectron.config import options_of_config
from repr_det.method.options import RePrOptions
from repr_det.studies.analysis import argument_parser as analysis_argument_parser
from repr_det.studies.comparison.command import argument_parser as comparison_argument_parser

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EVIDENCE = sorted((ROOT / "docs" / "evidence").glob("*.md"))
PROGRAM = re.compile(r"(python|torchrun|pip|make|sbatch|repr-det)$|(tools|examples|docs)/\S+\.py$")
PARSERS = {
    "train": lambda words: train_argument_parser().parse_args(words),
    "compare": lambda words: comparison_argument_parser().parse_args(words),
    "analyze": lambda words: analysis_argument_parser().parse_intermixed_args(words),
    "tools/benchmark.py": lambda words: benchmark.argument_parser().parse_intermixed_args(words),
    "docs/evidence/cifar10.py": cifar10.parse,
    "docs/evidence/digits.py": digits.parse,
}


def commands(page: Path) -> Iterator[str]:
    """The commands in indented and fenced blocks, lines that end in a backslash joined."""
    lines, fenced = iter(page.read_text().splitlines()), False
    for line in lines:
        fenced ^= line.startswith("```")
        if fenced or line.startswith("    "):
            while line.endswith("\\"):
                line = line[:-1] + next(lines).strip()
            if PROGRAM.match(line.strip().split(" ")[0]):
                yield line.strip()


def test_shown_commands_are_such_that_their_programs_take(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [command for page in [*PAGES, *EVIDENCE] for command in commands(page)]
    assert {"make", "pip", "torchrun", "repr-det", "sbatch"} <= {command.split(" ")[0] for command in found}
    for command in found:
        words = [word for word in shlex.split(command, comments=True) if word not in ("...", "KEY", "VALUE")]
        program, *words = words
        if program == "torchrun":
            program, words = "train", words[words.index("repr_det.train") + 1 :]
        elif program == "repr-det":
            program, *words = words
        elif program == "sbatch":
            assert (ROOT / words[0]).is_file()
            program, words = "train", words[1:]
        elif program == "make":
            assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in words)
        elif program != "pip":
            assert os.access(program, os.X_OK), f"{command}: is not executable"
        if program not in PARSERS:
            continue
        args = PARSERS[program](words)
        if file := getattr(args, "config_file", None):
            cfg = get_cfg()
            add_repr_config(cfg)
            cfg.merge_from_file(config_path(file))
            cfg.merge_from_list(getattr(args, "opts", None) or [])


def test_links_lead_to_files_of_the_repository_and_pages_stay_short():
    for page in [*PAGES, *EVIDENCE]:
        links = re.findall(r"\]\(((?!http|#)[^)]+)\)", page.read_text())
        assert [link for link in links if not (page.parent / link.partition("#")[0]).is_file()] == [], page
    assert sum(len(page.read_text().split()) for page in PAGES) <= 9000


@pytest.mark.parametrize("address", ["", "https://host/owner/name"])
def test_the_package_page_has_no_dead_link(address, monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: found.update(options))
    page = runpy.run_path(str(ROOT / "setup.py"))["package_page"]
    monkeypatch.setitem(page.__globals__, "REPOSITORY", address)
    links = re.findall(r"\]\(([^)]*)\)", page())
    assert "https://arxiv.org/abs/1811.07275" in links and all(link.startswith("https://") for link in links)
    assert (f"{address}/raw/main/docs/pictures/overlap.svg" in links) == bool(address)
    assert (f"{address}/blob/main/docs/method.md" in links) == bool(address)
    assert found["name"] == "repr_det"


def test_the_table_of_keys_is_that_of_the_options():
    page = (ROOT / "docs" / "configs.md").read_text()
    table = page.partition("<!-- keys of REPR -->\n\n")[2].partition("\n\n<!-- end of the keys -->")[0]
    assert table == markdown_table(), "put what option_table.markdown_table() returns into docs/configs.md"


def test_the_snippet_of_the_readme_prints_what_stands_below_it(caplog):
    snippet, output = re.findall(r"```(?:python)?\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    with caplog.at_level("INFO"):
        exec(snippet, {})
    printed, shown = (re.sub(r"\d+\.\d+", "0", text).splitlines() for text in ("\n".join(caplog.messages), output))
    assert set(shown) <= set(printed) and sum("restore after" in line for line in printed) == 3


def test_the_plain_pytorch_snippet_runs():
    block = re.search(
        r"((?:    .*\n|\n)*    repr_training = RePr(?:    .*\n|.*\n)+?)\n\S",
        (ROOT / "docs" / "own_loop.md").read_text(),
    )[1]
    model = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))})
    model.forward = model["backbone"].forward
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images = torch.randn(24, 2, 3, 8, 8)
    names = {"model": model, "optimizer": optimizer, "total_steps": 24, "batches": images}
    exec(textwrap.dedent(block).replace("... ", "model(batch).square().mean().backward()"), names)
    assert names["repr_training"].phase == "full" and names["repr_training"].scheme.cycle == 3


def test_detectron2_snippets_run_on_a_stock_config():
    page = (ROOT / "docs" / "own_loop.md").read_text()
    section = page.partition("## A Detectron2 trainer\n")[2].partition("\n## ")[0]
    block = "\n".join(line for line in section.splitlines() if line.startswith("    "))
    line = re.search(r"`(trainer\.register_hooks.*)`", (ROOT / "README.md").read_text())[1]
    hooks = []
    names = {"cfg": get_cfg(), "trainer": SimpleNamespace(register_hooks=hooks.extend), "RePrHook": RePrHook}
    with pytest.raises(UserError, match="has no node REPR: call add_repr_config"):
        RePrHook(names["cfg"])
    exec(line, names)
    exec(textwrap.dedent(block), names)
    assert len(hooks) == 3 and all(hook.options.resumed() == hooks[0].options.resumed() for hook in hooks)


def test_the_form_for_fine_tuning_is_that_of_the_config():
    call = re.search(r"    RePr\((.*?)loader=", (ROOT / "docs" / "own_loop.md").read_text(), re.S)[1]
    given = eval(f"dict({call.partition('total_steps,')[2]})", {})
    cfg = get_cfg()
    add_repr_config(cfg)
    cfg.merge_from_file(config_path("repr_r50_fpn_redundant.yaml"))
    options = vars(options_of_config(cfg))
    layers, exclude = given.pop("layers"), given.pop("exclude")
    assert given.items() <= options.items() and layers == ["backbone.body.layer*.conv*"] and exclude == ["*.conv3"]
    defaults = vars(RePrOptions())
    changed = {name for name in options if options[name] != defaults[name]} - {"layers", "exclude"}
    assert changed == given.keys()
