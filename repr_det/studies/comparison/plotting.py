"""matplotlib figures as inline SVG whose colours are CSS variables, so that one figure serves light and dark pages."""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colours that occur nowhere else, replaced in the SVG by the CSS variables of the page.
_VARIABLES = {
    "ink": "#010203",
    "muted": "#010204",
    "rule": "#010205",
    "shade": "#010206",
    "baseline": "#010207",
    "repr": "#010208",
    "both": "#010209",
    "phase-full": "#01020a",
    "phase-sub": "#01020b",
    "phase-after": "#01020c",
    "phase-transitions": "#01020d",
    "phase-evaluation": "#01020e",
    "phase-rest": "#01020f",
}
WIDTH = 9.0  # inches; the page shows it about 1080 px wide, so 9 pt text is 15 px


def colour(name: str) -> str:
    """The stand-in for the CSS variable ``--name``."""
    return _VARIABLES[name]


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures."""
    ink, muted, rule = colour("ink"), colour("muted"), colour("rule")
    with matplotlib.rc_context(
        {
            "svg.fonttype": "path",
            "svg.hashsalt": "repr_det",
            "text.parse_math": False,
            "font.family": "DejaVu Sans",
            "font.size": 8.0,
            "axes.titlesize": 8.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 8.0,
            "xtick.labelsize": 7.5,
            "ytick.labelsize": 7.5,
            "legend.fontsize": 8.0,
            "legend.frameon": False,
            "text.color": ink,
            "axes.labelcolor": ink,
            "axes.edgecolor": muted,
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "xtick.color": muted,
            "ytick.color": muted,
            "xtick.labelcolor": ink,
            "ytick.labelcolor": ink,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "grid.color": rule,
            "grid.linewidth": 0.5,
            "axes.axisbelow": True,
        }
    ):
        yield


def new_figure(height: float) -> Figure:
    """A figure of the page's width, ``height`` in inches; no pyplot, so no global state and no display."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
    FigureCanvasSVG(figure)
    return figure


def to_svg(figure: Figure, name: str, description: str) -> str:
    """An <svg> element for a HTML page.

    Args:
        name: prefix of all ids in it, unique on the page.
        description: what a screen reader says.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"\s+\n", "\n", svg)
    for variable, stand_in in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    # The page decides the width; the viewBox keeps the proportions.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
