"""The figure of a run: pair latency against tokens, one line per backend or rival.

The first panel is the first wire's, with the rivals and the bound; where there are more
wires, a second one compares them on the first backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_a2a.bench.report import heading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Line", "draw", "write_plot"]

# Okabe and Ito's colours: told apart by colour-blind readers, and in grey by the markers.
_COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D00")
_MARKERS = "osD^vPX"
_BOUND = {"color": "#555555", "linestyle": (0, (4, 3)), "linewidth": 1.4}
_BOUNDS = ("memcpy bound", "link floor")
_GREY = "#666666"
_LABEL_GAP = 0.062  # of the panel's height

Case = dict[str, Any]
Line = tuple[str, list[int], list[float]]  # name, tokens, microseconds


def write_plot(document: Mapping[str, Any], path: Path) -> None:
    """Writes the PNG.

    Raises:
        ImportError: without matplotlib.
    """
    draw(heading(document), _panels(document["cases"]), "dispatch + combine, us", path)


def draw(title: str, panels: Sequence[tuple[str, list[Line]]], measured: str, path: Path) -> None:
    """Writes the PNG of panels, each (title, lines): what is ``measured`` against tokens.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(1.6 + 6.2 * len(panels), 5.0), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (name, lines) in zip(axes, panels, strict=True):
        _frame(panel, name, _all_tokens(lines))
        _draw(panel, lines)
    axes[0].set_ylabel(measured, color=_GREY)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panels(cases: Sequence[Case]) -> list[tuple[str, list[Line]]]:
    """(title, lines) of each panel."""
    wires = list(dict.fromkeys(case["wire"] for case in cases))
    first = wires[0]
    names = list(dict.fromkeys(case["name"] for case in cases if case["wire"] == first))
    panels = [(f"wire {first}", [_line(cases, name, name, first) for name in names])]
    if len(wires) > 1:
        ours = next(case["name"] for case in cases if case["kind"] == "backend")
        panels.append((f"{ours}, by wire", [_line(cases, wire, ours, wire) for wire in wires]))
    return panels


def _line(cases: Sequence[Case], label: str, name: str, wire: str) -> Line:
    points = sorted(
        (case["tokens"], case["pair_us"]["median"])
        for case in cases
        if case["name"] == name and case["wire"] == wire
    )
    return label, [tokens for tokens, _ in points], [value for _, value in points]


def _all_tokens(lines: Sequence[Line]) -> list[int]:
    return sorted({tokens for _, xs, _ in lines for tokens in xs})


def _frame(panel: Any, title: str, tokens: list[int]) -> None:
    panel.set_title(title, loc="left", fontsize=10, color=_GREY)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(tokens, [str(value) for value in tokens])
    panel.minorticks_off()
    panel.set_xlabel("tokens per rank", color=_GREY)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    panel.grid(visible=True, color="#E4E4E4", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=_GREY, length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color("#BBBBBB")


def _draw(panel: Any, lines: Sequence[Line]) -> None:
    ends = []
    shown = 0
    for name, xs, ys in lines:
        if name in _BOUNDS:
            panel.plot(xs, ys, **_BOUND)
            colour = _BOUND["color"]
        else:
            colour, marker = _COLOURS[shown % len(_COLOURS)], _MARKERS[shown % len(_MARKERS)]
            width = 2.4 if shown == 0 else 1.6
            panel.plot(xs, ys, color=colour, marker=marker, markersize=5, linewidth=width)
            shown += 1
        ends.append((name, xs[-1], ys[-1], colour))
    _label(panel, ends)


def _label(panel: Any, ends: Sequence[tuple[str, int, float, Any]]) -> None:
    """Names the lines at their right ends, moved apart where they would overlap."""
    panel.margins(x=0.04)
    to_axes = panel.transScale + panel.transLimits
    panel.autoscale_view()
    heights = [(float(to_axes.transform((x, y))[1]), name, colour) for name, x, y, colour in ends]
    heights.sort()
    placed = _apart([height for height, _, _ in heights])
    for place, (_, name, colour) in zip(placed, heights, strict=True):
        panel.annotate(
            name,
            (1.01, place),
            xycoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
        )


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights, a gap between neighbours, each as near to where it was as that allows."""
    # Without the gaps this is isotonic regression: runs that overlap share their mean.
    runs: list[list[float]] = []
    for index, height in enumerate(heights):
        runs.append([height - index * _LABEL_GAP])
        while len(runs) > 1 and _mean(runs[-2]) > _mean(runs[-1]):
            last = runs.pop()
            runs[-1] += last
    means = [_mean(run) for run in runs for _ in run]
    return [mean + index * _LABEL_GAP for index, mean in enumerate(means)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
