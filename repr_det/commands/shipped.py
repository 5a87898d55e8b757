"""The configs that come with the package: in a wheel beside its modules, in a checkout in configs/."""

import os
from pathlib import Path

from repr_det.method.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next((x for x in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if x.is_dir()), _PACKAGE / "configs")


def config_path(name: str, suffix: str = "") -> str:
    """The file that --config-file means: a path, or the name of a shipped config (repr_r50_fpn.yaml).

    Args:
        suffix: what its name has to end with.

    Raises:
        UserError: there is no such file.
    """
    for path in (name, os.path.join(CONFIGS, name)):
        if os.path.isfile(path) and path.endswith(suffix):
            return path
    if not name:
        raise UserError("--config-file is missing")
    shipped = sorted(str(x.relative_to(CONFIGS)) for x in CONFIGS.rglob("*") if x.suffix == (suffix or ".yaml"))
    raise UserError(
        f"--config-file {name!r} is not a {f'{suffix} ' * bool(suffix)}file, nor the name of a shipped config: "
        f"{', '.join(shipped)}"
    )
