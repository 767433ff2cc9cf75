"""Curves as SVG text that takes its colours from the page around it, so one drawing serves light and dark.

The same numbers always give the same bytes. Colours are CSS variables with a fallback, so a drawing also stands alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

INK, FAINT, LINE, OTHER = "#1b2a24", "#c9d2cd", "#0b7a55", "#b4540a"
VARIABLES = {INK: "--ink", FAINT: "--rule", LINE: "--accent", OTHER: "--second"}
KEY = ((LINE, "-"), (OTHER, "--"), (INK, ":"), (LINE, "-."), (OTHER, ":"), (INK, "-"))
"""Colour and dashes of the first, second, ... curve of a drawing."""

Curve = Sequence[tuple[float, float]]

BESIDE = [(across, up) for up in (1, -1, 0, 3, -3, 5, -5) for across in (1, -1, 0) if across or abs(up) == 1]
"""Where the label of a point may stand: to the right or left of it or in the middle, in steps of half a letter."""


def success_curve(name: str, curves: Sequence[Curve], title: str, base: float | None = None) -> str:
    """Success in percent over iterations, one line a curve; `KEY` tells how the lines are drawn, in order.

    Args:
        name: unique within the page; it prefixes every id in the drawing.
        curves: each of (iteration, success in [0, 1]) pairs.
        title: what a screen reader says.
        base: success of the base checkpoint in [0, 1], drawn as a level.
    """
    figure, axes = _figure((3.6, 2.3))
    if base is not None:
        axes.axhline(100 * base, color=OTHER, linewidth=1, linestyle=(0, (4, 3)))
        above = base < 0.9
        axes.annotate(
            "base", (1, 100 * base), (-2, 3 if above else -3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="bottom" if above else "top", color=OTHER, fontsize=9,
        )  # fmt: skip
    for index, curve in enumerate(curves):
        _draw(axes, [(x, 100 * y) for x, y in curve], index)
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100])
    _label(axes, "iteration", "success in training, %")
    return _svg(figure, name, title)


def quantity_curve(name: str, curve: Curve, title: str, unit: str, boundaries: Sequence[float] = ()) -> str:
    """One quantity over all iterations of the run, with a thin line where a new task begins."""
    figure, axes = _figure((3.6, 1.7))
    for boundary in boundaries:
        axes.axvline(boundary, color=FAINT, linewidth=1)
    _draw(axes, curve, 0)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), high if high > 0 else 1.0)
    _label(axes, "iteration of the whole run", unit)
    return _svg(figure, name, title)


def forgetting_curve(name: str, curves: Sequence[Sequence[float]], title: str) -> str:
    """Percentage points lost on earlier tasks after the second, third, ... task, one line a curve as in `KEY`."""
    figure, axes = _figure((3.6, 2.0))
    axes.axhline(0, color=FAINT, linewidth=1)
    for index, curve in enumerate(curves):
        _draw(axes, list(enumerate(curve, 2)), index)
    low, high = axes.get_ylim()
    axes.set_ylim(min(-10.0, low), max(30.0, high))
    _label(axes, "tasks taught", "points lost")
    return _svg(figure, name, title)


def trade_off(name: str, points: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]], title: str) -> str:
    """Gain in AVG across, forgetting upwards, each point with its label and both 95 % intervals.

    Args:
        name: unique within the page.
        points: of (label, gain, forgetting), estimates `{value, low, high}` in percentage points.
        title: what a screen reader says.
    """
    figure, axes = _figure((7.4, 4.2))
    axes.grid(axis="x", color=FAINT, linewidth=0.5, alpha=0.6)
    for at in (axes.axhline, axes.axvline):
        at(0, color=FAINT, linewidth=1)
    for _, gain, lost in points:
        errors = [[[max(0, e["value"] - e["low"])], [max(0, e["high"] - e["value"])]] for e in (gain, lost)]
        axes.errorbar(
            gain["value"], lost["value"], xerr=errors[0], yerr=errors[1], color=LINE, ecolor=FAINT, elinewidth=1,
            marker="o", markersize=4.5,
        )  # fmt: skip
    _label(axes, "gain in AVG, points", "NBT, points lost")
    name_points(axes, [(label, gain["value"], lost["value"]) for label, gain, lost in points], 8)
    return _svg(figure, name, title)


def name_points(axes: Any, points: Sequence[tuple[str, float, float]], size: float) -> None:
    """Write a label beside each point, where it covers no point and no other label if there is such a place.

    Args:
        axes: of matplotlib, with everything else already in it.
        points: of (label, x, y).
        size: of the letters, in points.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # so that positions are final
    radius = size / 2 * axes.figure.dpi / 72
    taken = [Bbox([at - radius, at + radius]) for at in axes.transData.transform([(x, y) for _, x, y in points])]
    for label, x, y in points:
        text = axes.annotate(label, (x, y), (0, 0), textcoords="offset points", fontsize=size, color=INK)
        for across, up in (*BESIDE, BESIDE[0]):  # the first again where none is free
            text.set_position((across * size / 2, up * size / 2))
            text.set_ha(("right", "center", "left")[across + 1])
            text.set_va(("top", "center", "bottom")[(up > 0) - (up < 0) + 1])
            box = text.get_window_extent()
            if axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and not box.count_overlaps(taken):
                break
        taken.append(box)


def lines(
    name: str,
    curves: Sequence[Curve],
    title: str,
    x: str,
    y: str,
    bands: Sequence[Sequence[tuple[float, float]]] = (),
    limits: tuple[float, float] | None = None,
) -> str:
    """Any quantity over any other, one line a curve, drawn as `KEY` tells.

    Args:
        name: unique within the page.
        curves: of (x, y) pairs.
        title: what a screen reader says.
        x: what the horizontal axis says.
        y: what the vertical axis says.
        bands: for each curve the (low, high) at each of its points, drawn as a shade.
        limits: of the vertical axis; by default it begins at 0.
    """
    figure, axes = _figure((3.6, 2.3))
    for index, curve in enumerate(curves):
        if index < len(bands):
            lows, highs = zip(*bands[index], strict=True)
            colour = KEY[index % len(KEY)][0]
            axes.fill_between([x for x, _ in curve], lows, highs, color=colour, alpha=0.15, linewidth=0)
        _draw(axes, curve, index)
    axes.set_ylim(limits or (min(0.0, axes.get_ylim()[0]), None))
    _label(axes, x, y, whole=all(float(place).is_integer() for curve in curves for place, _ in curve))
    return _svg(figure, name, title)


def key(index: int) -> str:
    """A short line, drawn as the `index`-th curve of `success_curve`."""
    colour, dashes = KEY[index % len(KEY)]
    pattern = {"-": "", "--": "6 3", ":": "1.5 2.5", "-.": "6 2 1.5 2"}[dashes]
    line = (
        f'<path d="M0 5H40" stroke="var({VARIABLES[colour]}, {colour})" stroke-width="2" stroke-dasharray="{pattern}"/>'
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 10" aria-hidden="true">{line}</svg>'


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, color=FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.6)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, axes


def _draw(axes: Any, curve: Curve, index: int) -> None:
    xs, ys = [x for x, _ in curve], [y for _, y in curve]
    colour, dashes = KEY[index % len(KEY)]
    marker = "o" if len(curve) <= 30 else ""
    axes.plot(xs, ys, color=colour, linewidth=1.7, linestyle=dashes, marker=marker, markersize=3)


def _label(axes: Any, x: str, y: str, whole: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))


def _svg(figure: Any, name: str, title: str) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg")
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", text.getvalue(), flags=re.DOTALL)
    body = body[body.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', body)
    inside = body[body.index(">") + 1 :]
    inside = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", inside)
    for colour, variable in VARIABLES.items():
        inside = inside.replace(colour, f"var({variable}, {colour})")
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box and box[0]}'
    return f'{opening} class="plot" role="img" aria-label="{escape(title)}">{inside}'
