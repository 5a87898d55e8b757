"""Hooks of `make docs`: pages from elsewhere, links from file names, a check of docstrings."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
# Pages whose text is a file of the repository's root.
INCLUDED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}


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
        markdown = (ROOT / INCLUDED[page.file.src_uri]).read_text().replace("](docs/", "](")
        for name, source in INCLUDED.items():
            markdown = markdown.replace(f"]({source})", f"]({name})")
    mine = page.file.src_uri

    def link(found: re.Match) -> str:
        return found[0] if found[1] == mine else f"[{found[0]}]({found[1]})"

    return re.sub(r"(?<!\[)`docs/([\w/]+\.md)`", link, markdown)
