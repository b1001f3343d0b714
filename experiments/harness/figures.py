"""House style for figures, and the few shapes that several papers need.

Figures are made without pyplot: no window, no global list of open figures. Draw inside `style()`, which also works as
a decorator (`@figures.style()`) of a function that makes a figure. Text from data goes through `plain`.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiments.harness.claims import interval, named

# Okabe & Ito (2008), told apart with every common colour vision; their yellow is left out, it vanishes on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH = 7.2  # inches; the report shows a figure at about this size
DPI = 160

_RC = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.cmap": "cividis",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The house style, for the drawing inside."""
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context(_RC | {"axes.prop_cycle": cycler(color=PALETTE)}):
        yield


@style()
def new(rows: int = 1, cols: int = 1, *, width: float = WIDTH, height: float | None = None, **options):
    """`(figure, axes)` as from `pyplot.subplots`, `options` included; sizes in inches."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height or 3.4 * rows), layout="constrained")
    return fig, fig.subplots(rows, cols, **options)


def plain(text: object) -> str:
    """Text from data as matplotlib should show it: no formulas between dollars, no control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)).replace("$", r"\$")


def shades(count: int) -> list:
    """Colours for an ordered family (blocks, steps), dark to light; the lightest still shows on white."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.85, count)))


@style()
def line(ax, x, y, *, low=None, high=None, label: str | None = None, **options) -> None:
    """A line with markers; `low` and `high` (same length as `y`) add an interval as a band."""
    (drawn,) = ax.plot(x, y, **{"marker": "o", "label": label and plain(label)} | options)
    if low is not None:
        band = {"color": drawn.get_color(), "alpha": 0.2, "linewidth": 0}
        ax.fill_between(x, np.asarray(low, float), np.asarray(high, float), **band)


@style()
def seed_band(ax, x, values_SX, **options) -> None:
    """The mean over seeds with its 95 % t interval as a band (none for a single seed); `values_SX` has a row a seed."""
    columns = [interval(values_S) for values_S in np.asarray(values_SX, float).T]
    mean, low, high = (
        np.array([np.nan if c[key] is None else c[key] for c in columns], float) for key in ("mean", "low", "high")
    )
    bounds = {} if np.isnan(low).all() else {"low": low, "high": high}
    line(ax, x, mean, **bounds, **options)


@style()
def seed_lines(ax, x, values_SX, **options) -> None:
    """The mean over seeds, and each seed as a thin line: for few seeds. `values_SX` has a row a seed."""
    values_SX = np.asarray(values_SX, float)
    (drawn,) = ax.plot(x, values_SX.mean(0), **{"marker": "o"} | options)
    thin = options | {"label": None, "marker": "", "linewidth": 0.7, "alpha": 0.5, "color": drawn.get_color()}
    for values_X in values_SX if len(values_SX) > 1 else ():
        ax.plot(x, values_X, **thin)


@style()
def bars(ax, labels: Sequence, values, *, low=None, high=None, **options) -> None:
    """One bar a label; `low` and `high` add intervals."""
    values = np.asarray(values, float)
    errors = None if low is None else np.stack([values - np.asarray(low, float), np.asarray(high, float) - values])
    place = np.arange(values.size)
    ax.bar(place, values, yerr=errors, **{"width": 0.7, "capsize": 3, "ecolor": "#444444"} | options)
    ax.set_xticks(place, [plain(label) for label in labels])
    ax.grid(False, axis="x")


@style()
def grouped_bars(ax, labels: Sequence, groups: Mapping[str, Sequence[Sequence[float]]], **options) -> None:
    """For every label one bar a group side by side: means over seeds with their 95 % t intervals, within [0, 1].

    `groups` gives for every group's name and label the values of the seeds; labels may have several lines.
    """
    width = 0.8 / len(groups)
    for g, (name, values_LS) in enumerate(groups.items()):
        columns = [named("value", values_S, 0.0, 1.0) for values_S in values_LS]
        mean, low, high = (
            np.array([np.nan if c[key] is None else c[key] for c in columns], float)
            for key in ("value", "value_low", "value_high")
        )
        error = np.stack([mean - low, high - mean])  # NaN for a single seed: no bar
        place = np.arange(len(mean)) + (g - (len(groups) - 1) / 2) * width
        looks = {"width": 0.95 * width, "capsize": 2, "ecolor": "#444444"} | options
        ax.bar(place, mean, yerr=error, label=plain(name), **looks)
    ax.set_xticks(np.arange(len(labels)), ["\n".join(map(plain, str(label).split("\n"))) for label in labels])
    ax.grid(False, axis="x")


@style()
def heatmap(ax, values, *, rows: Sequence = (), cols: Sequence = (), label: str = "", **options) -> None:
    """A matrix as colours with a colour bar named `label`; NaN is left grey. `options` as for `imshow`."""
    image = ax.imshow(np.asarray(values, float), **{"aspect": "auto", "interpolation": "nearest"} | options)
    ax.set_facecolor("#cccccc")
    ax.grid(False)
    if len(rows):
        ax.set_yticks(np.arange(len(rows)), [plain(text) for text in rows])
    if len(cols):
        ax.set_xticks(np.arange(len(cols)), [plain(text) for text in cols], rotation=90)
    ax.figure.colorbar(image, ax=ax, label=label)


@style()
def png(fig) -> bytes:
    """The figure as a PNG file; the same drawing gives the same bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Tokens come in every script; a box in place of a glyph is all that a missing font should cost.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
