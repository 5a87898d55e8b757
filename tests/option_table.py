"""The table of the keys of REPR in docs/configs.md, from ``RePrOptions``."""

from detectron2.config import CfgNode

from repr_det import add_repr_config
from repr_det.detectron.config import value_at
from repr_det.method.criteria import CRITERIA
from repr_det.method.options import about_option, option_names


def markdown_table() -> str:
    rows = ["| key | argument | default | values | |", "|---|---|---|---|---|"]
    rows.append("| `REPR.ENABLED` | | `False` | True, False | RePr, or plain training. |")
    cfg = CfgNode()
    add_repr_config(cfg)
    for name in option_names():
        about = about_option(name)
        values = f"one of {', '.join(sorted(CRITERIA))}" if name == "criterion" else about.range() or "a list"
        default = value_at(cfg.REPR, about.key)
        rows.append(f"| `REPR.{about.key}` | `{name}` | `{default!r}` | {values} | {about.meaning} |")
    return "\n".join(rows)
