"""Config files: those that come with the package, and yaml as Detectron2 reads it, without running code in it."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from repr_det.detectron.config import as_user_error
from repr_det.method.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel beside its modules, in a checkout in configs/.
CONFIGS = next((x for x in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if x.is_dir()), _PACKAGE / "configs")
_ARITHMETIC = re.compile(r"(for|in|x|[\d\s.,*/+()\[\]-])*")


def config_path(name: str) -> str:
    """The file that --config-file means: a path, or the name of a shipped config (repr_r50_fpn.yaml).

    Raises:
        UserError: there is no such file.
    """
    for path in (name, os.path.join(CONFIGS, name)):
        if os.path.isfile(path):
            return path
    if not name:
        raise UserError("--config-file is missing")
    shipped = sorted(str(path.relative_to(CONFIGS)) for path in (*CONFIGS.glob("*.yaml"), *CONFIGS.glob("lazy/*.py")))
    raise UserError(f"--config-file {name!r} is not a file, nor the name of a shipped config: {', '.join(shipped)}")


def merge_config_file(cfg: CfgNode, file: str) -> None:
    """``cfg.merge_from_file`` with checked files.

    Detectron2 falls back to ``yaml.unsafe_load``, which its own Base-RetinaNet.yaml needs for the sizes of its anchors
    (``!!python/object/apply:eval`` of arithmetic). The files are held against that one use first.

    Raises:
        UserError: naming the file, and what is wrong with it.
    """
    _check_config_file(file, cfg)
    with naming_close_keys(cfg), as_user_error(file):
        cfg.merge_from_file(file, allow_unsafe=True)


@contextlib.contextmanager
def naming_close_keys(cfg: CfgNode) -> Iterator[None]:
    """A UserError of a key that ``cfg`` does not have names the ones that are closest to it."""
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


def _check_config_file(file: str, cfg: CfgNode, before: tuple[str, ...] = ()) -> None:
    """A yaml file, and those that it builds on, are mappings of keys of ``cfg``; those ``before`` build on it."""
    with as_user_error(file):
        with PathManager.open(file) as opened:
            text = opened.read()
        if re.search(r"^dataloader:$", text, re.M) and "_target_:" in text:
            raise UserError(
                f"{file}: is what a run of a LazyConfig writes down of its config, to be read only: give the .py file "
                "that it was made from, with its overrides"
            )
        content = yaml.load(text, _Loader)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        found = "nothing" if content is None else str(content)[:40]
        raise UserError(f"{file}: must hold config keys with their values (MODEL: ...), got {found}")
    for key, value in content.items():
        if value is None and isinstance(cfg.get(key), CfgNode):
            raise UserError(f"{file}: {key} is empty: give keys below it, or leave it out")
    bases = content.get("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise UserError(f"{file}: _BASE_ must be the name of a config file, got {base!r}")
        path = base
        if not base.startswith(("http://", "https://")):
            path = os.path.join(os.path.dirname(file), os.path.expanduser(base))
            if not os.path.isfile(path):
                shipped = CONFIGS / base
                hint = f"; the one of this name that comes with repr_det is {shipped}" if shipped.is_file() else ""
                raise UserError(f"{file}: _BASE_ {base!r} is not a file: it is looked for as {path}{hint}")
        if os.path.realpath(path) in map(os.path.realpath, (*before, file)):
            raise UserError(f"{file}: _BASE_ {base!r} builds on this file again")
        _check_config_file(path, cfg, (*before, file))


class _Loader(yaml.SafeLoader):
    """Refuses what would run code, but for arithmetic, and a key that is given twice."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        """As in yaml, which lets the last one win."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]} stands there twice, put both blocks together", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def arithmetic(self, node: yaml.Node) -> None:
        """Checks an expression, whose value the check does not need."""
        for text in self.construct_sequence(node):
            if not _ARITHMETIC.fullmatch(str(text)):
                raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not arithmetic", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _Loader.arithmetic)
