"""What `make docs` adds to MkDocs: keys of REPR read from the code, links from file names, a check of docstrings."""

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "repr_det" / "detectron" / "config.py"
# Pages whose text is a file of the repository's root.
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
KEYS = "<!-- keys of REPR -->"


def on_pre_build(**_: Any) -> None:
    """Fails where a name that `repr_det` exports lacks a docstring or is not on the API page."""
    package = griffe.load("repr_det", search_paths=[str(ROOT)], resolve_aliases=True)
    shown = (ROOT / "docs" / "api.md").read_text()
    problems = []
    for name in package.exports or ():
        exported = package[str(name)]
        if not re.search(rf"^::: repr_det[\w.]*\.{name}$", shown, re.M):
            problems.append(f"docs/api.md does not show repr_det.{name}")
        members = exported.members.values() if exported.is_class else ()
        public = [m for m in members if not m.name.startswith("_") and (m.is_function or "property" in m.labels)]
        problems += [f"{x.path} has no docstring" for x in (exported, *public) if not x.has_docstring]
    if problems:
        raise PluginError("; ".join(problems))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in what comes from elsewhere, and makes links of names of pages (`docs/results.md`)."""
    if page.file.src_uri in INCLUDED:
        markdown = (ROOT / INCLUDED[page.file.src_uri]).read_text()
    if KEYS in markdown:
        markdown = markdown.replace(KEYS, keys_of_repr())
    mine = page.file.src_uri

    def link(found: re.Match) -> str:
        return found[0] if found[1] == mine else f"[{found[0]}]({found[1]})"

    return re.sub(r"(?<!\[)`docs/([\w/]+\.md)`", link, markdown)


def keys_of_repr() -> str:
    """A table of the keys of REPR, their defaults, and the comments above them in detectron/config.py."""
    source = CONFIG.read_text()
    (function,) = [x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef) and x.name == "add_repr_config"]
    lines, rows, comment, last = source.splitlines(), [], [], 0
    for number in range(function.lineno, function.end_lineno + 1):
        line = lines[number - 1].strip()
        if line.startswith("#"):
            comment = comment if last == number - 1 else []
            comment.append(line.lstrip("# "))
            last = number
        elif found := re.fullmatch(r"node\.([A-Z][\w.]*) = (.+)", line):
            if "CfgNode" in found[2]:
                comment = []
                continue
            rows.append(f"| `REPR.{found[1]}` | `{ast.literal_eval(found[2])!r}` | {' '.join(comment)} |")
            comment = []
    return "\n".join(["| key | default | |", "|---|---|---|", *rows])
