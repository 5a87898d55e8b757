"""Config files in yaml: what Detectron2 reads, without running code that they hold."""

import ast
import os

import yaml
from detectron2.config import CfgNode

from repr_det.commands.shipped import CONFIGS
from repr_det.detectron.config import as_user_error
from repr_det.method.errors import UserError

_ARITHMETIC = (
    ast.Expression,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.BinOp,
    ast.UnaryOp,
    ast.operator,
    ast.unaryop,
    ast.ListComp,
    ast.comprehension,
    ast.Name,
    ast.expr_context,
)


def merge_config_file(cfg: CfgNode, file: str) -> None:
    """``cfg.merge_from_file`` with checked files.

    Detectron2 falls back to ``yaml.unsafe_load``, which its own Base-RetinaNet.yaml needs for the sizes of its anchors
    (``!!python/object/apply:eval`` of arithmetic). The files are held against that one use first.

    Raises:
        UserError: naming the file, and what is wrong with it.
    """
    local = _check_config_file(file, cfg)
    with as_user_error(file):
        cfg.merge_from_file(file, allow_unsafe=local)


def _check_config_file(file: str, cfg: CfgNode, before: tuple[str, ...] = ()) -> bool:
    """A yaml file, and those that it builds on, are mappings of keys.

    Args:
        cfg: the config with its defaults.
        before: the files that build on this one.

    Returns:
        False where one of them is elsewhere (http), and so not checked.
    """
    with as_user_error(file), open(file, encoding="utf-8") as stream:
        content = yaml.load(stream, _Loader)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        found = "nothing" if content is None else str(content)[:40]
        raise UserError(f"{file}: must hold config keys with their values (MODEL: ...), got {found}")
    for key, value in content.items():
        if value is None and isinstance(cfg.get(key), CfgNode):
            raise UserError(f"{file}: {key} is empty: give keys below it, or leave it out")
    bases = content.get("_BASE_", [])
    local = True
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise UserError(f"{file}: _BASE_ must be the name of a config file, got {base!r}")
        if base.startswith(("http://", "https://")):
            local = False
            continue
        path = os.path.join(os.path.dirname(file), os.path.expanduser(base))
        if not os.path.isfile(path):
            shipped = CONFIGS / base
            hint = f"; the one of this name that comes with repr_det is {shipped}" if shipped.is_file() else ""
            raise UserError(f"{file}: _BASE_ {base!r} is not a file: it is looked for as {path}{hint}")
        if os.path.realpath(path) in map(os.path.realpath, (*before, file)):
            raise UserError(f"{file}: _BASE_ {base!r} builds on this file again")
        local &= _check_config_file(path, cfg, (*before, file))
    return local


class _Loader(yaml.SafeLoader):
    """Refuses what would run code, but for arithmetic."""

    def arithmetic(self, node: yaml.Node) -> None:
        """Checks one expression, whose value the check does not need."""
        for text in self.construct_sequence(node):
            try:
                nodes = list(ast.walk(ast.parse(str(text), mode="eval")))
            except SyntaxError:
                nodes = [None]
            if not all(isinstance(x, _ARITHMETIC) for x in nodes):
                raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not arithmetic", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _Loader.arithmetic)
