"""The two figures: a training curve, and accuracy against trainable parameters."""

from __future__ import annotations

import base64
import html
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK, GREY, BLUE, RED = "#222222", "#8a8a8a", "#1f5fa8", "#c2410c"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def loss_curve(path: Path, train: Sequence[float], val: Sequence[tuple[int, float, float | None]], best_step: int, title: str) -> None:
    """Training loss (each step, and its running mean), validation loss, and the step that was kept."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(7, 4)
        axes = figure.add_subplot()
        steps = range(1, len(train) + 1)
        axes.plot(steps, train, color=BLUE, alpha=0.25, linewidth=0.8)
        window = max(1, len(train) // 20)
        mean = [statistics.fmean(train[max(0, i - window) : i]) for i in steps]
        axes.plot(steps, mean, color=BLUE, linewidth=1.8, label=f"training (mean of {window} steps)")
        if val:
            axes.plot([v[0] for v in val], [v[1] for v in val], color=RED, marker="o", markersize=4, linewidth=1.5, label="validation")
            best = min(val, key=lambda v: v[1])
            axes.axvline(best_step, color=RED, linewidth=0.8, linestyle=":")
            side = "right" if best_step > len(train) / 2 else "left"
            note = axes.annotate(
                f"kept: step {best_step}, {best[1]:.3f}",
                (best_step, best[1]),
                (-6 if side == "right" else 6, -16),
                textcoords="offset points",
                ha=side,
                color=RED,
            )
            note.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
        axes.set(xlabel="step", ylabel="loss", title=title)
        axes.margins(x=0.02, y=0.12)
        axes.legend(frameon=False)
        figure.savefig(path)


def comparison(path: Path, rows: list[dict], lines: list[tuple[str, float]], title: str, metric: str) -> None:
    """Accuracy (or NLL per token) over trainable parameters, one point a method with the spread over seeds.

    Args:
        rows: dicts with `name`, `trainable`, `mean`, `spread` (standard deviation, or None for one seed) and `reference`.
        lines: (label, value) of references without trainable adapter parameters, drawn as horizontal lines.
    """
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 5.6)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        boxes = []
        for row in rows:
            color = RED if row["reference"] else BLUE
            axes.errorbar(
                row["trainable"],
                row["mean"],
                yerr=row["spread"] or 0,
                fmt="s" if row["reference"] else "o",
                color=color,
                markersize=6,
                capsize=3,
                linewidth=1.2,
                elinewidth=1,
            )
        sizes = [row["trainable"] for row in rows]
        axes.set_xlim(min(sizes) / 2.2, max(sizes) * 3)
        values = [v for row in rows for v in (row["mean"] - (row["spread"] or 0), row["mean"] + (row["spread"] or 0))] + [v for _, v in lines]
        low, high = min(values), max(values)
        pad = max(0.08 * (high - low), 1e-3)
        axes.set_ylim(low - pad, high + pad)
        axes.set(xlabel="trainable parameters (head included)", ylabel=metric, title=title)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
        if "accuracy" in metric:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        figure.draw_without_rendering()
        for row in rows:
            x, y = axes.transData.transform((row["trainable"], row["mean"]))
            up = axes.transData.transform((row["trainable"], row["mean"] + (row["spread"] or 0)))[1] - y
            boxes += [(x - 7, y - 7, x + 7, y + 7), (x - 4, y - up - 2, x + 4, y + up + 2)]
        for label, value in lines:
            axes.axhline(value, color=GREY, linewidth=1, linestyle="--")
            y = axes.transData.transform((sizes[0], value))[1]
            frame = axes.get_window_extent()
            boxes.append((frame.x0, y - 1, frame.x1, y + 1))
            boxes.append(_place_line_label(figure, axes, f"{label} {_value(value)}", value, boxes))
        for row in sorted(rows, key=lambda r: (not r["reference"], r["trainable"])):
            boxes.append(_place(figure, axes, row["name"], row["trainable"], row["mean"], RED if row["reference"] else INK, boxes))
        figure.savefig(path)


def _value(v: float) -> str:
    return f"{100 * v:.1f} %" if 0 <= v <= 1 else f"{v:.3f}"


def _short(v: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if v >= limit:
            return f"{v / limit:g}{letter}"
    return f"{v:g}"


def _overlap(a: tuple, b: tuple) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _place(figure: Figure, axes, text: str, x: float, y: float, color: str, boxes: list[tuple]) -> tuple:
    """Write `text` near (x, y) where it covers least of `boxes` (pixels); returns its own box. Far labels get a line to their point."""
    note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", color=color, fontsize=9, va="center", ha="center")
    extent = note.get_window_extent(figure.canvas.get_renderer())
    w, h = extent.width + 4, extent.height + 2
    px, py = axes.transData.transform((x, y))
    frame = axes.get_window_extent()
    best, best_cost = (px, py), math.inf
    for radius, angle in itertools.product((0, 1, 2, 3, 4, 6, 8), range(0, 360, 15)):
        dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        cx, cy = px + dx * (w / 2 + 10 + radius * 10), py + dy * (h / 2 + 10 + radius * 10)
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        outside = max(0, frame.x0 - box[0]) + max(0, box[2] - frame.x1) + max(0, frame.y0 - box[1]) + max(0, box[3] - frame.y1)
        cost = sum(_overlap(box, b) for b in boxes) * 3 + 50 * outside + 6 * radius**2 + (0 if angle == 0 else 1)
        if cost < best_cost:
            best, best_cost = (cx, cy), cost
    scale = 72 / figure.dpi
    note.set_position(((best[0] - px) * scale, (best[1] - py) * scale))
    if math.hypot((best[0] - px) / (w / 2), (best[1] - py) / (h / 2)) > 3.2:
        tip = axes.transData.inverted().transform(best)
        axes.plot([x, tip[0]], [y, tip[1]], color=GREY, linewidth=0.6, zorder=0)
        note.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    return (best[0] - w / 2, best[1] - h / 2, best[0] + w / 2, best[1] + h / 2)


def _place_line_label(figure: Figure, axes, text: str, y: float, boxes: list[tuple]) -> tuple:
    """Write `text` just above or below a horizontal line, where it covers least."""
    note = axes.text(0, y, text, color=GREY, fontsize=9, va="bottom", ha="left")
    extent = note.get_window_extent(figure.canvas.get_renderer())
    frame = axes.get_window_extent()
    py = axes.transData.transform((1, y))[1]
    best, best_cost = None, math.inf
    for share, below in itertools.product([i / 40 for i in range(41)], (False, True)):
        px = frame.x0 + 4 + share * (frame.width - extent.width - 8)
        bottom = py - extent.height - 3 if below else py + 2
        box = (px, bottom, px + extent.width, bottom + extent.height)
        cost = sum(_overlap(box, b) for b in boxes) + 20 * max(0, frame.y0 - box[1]) + 20 * max(0, box[3] - frame.y1) + share + below
        if cost < best_cost:
            best, best_cost = box, cost
    left, bottom = axes.transData.inverted().transform((best[0], best[1]))
    note.set_position((left, bottom))
    return best


def page(path: Path, png: Path, title: str, facts: list[str], head: list[str], rows: list[list[str]], skipped: list[tuple[str, str]]) -> None:
    """A self-contained HTML page: the figure, the table, and what was left out."""
    image = base64.b64encode(png.read_bytes()).decode()
    cell = lambda tag, v: f"<{tag}>{html.escape(str(v))}</{tag}>"  # noqa: E731
    body = "\n".join(f"<tr>{''.join(cell('td', v) for v in row)}</tr>" for row in rows)
    left_out = "".join(f"<li><b>{html.escape(n)}</b>: {html.escape(why)}</li>" for n, why in skipped)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100% }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: right; padding: .3rem .7rem; border-bottom: 1px solid #e6e6e6; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<ul>{"".join(f"<li>{html.escape(f)}</li>" for f in facts)}</ul>
<img alt="{html.escape(title)}" src="data:image/png;base64,{image}">
<div class="wide"><table><thead><tr>{"".join(cell("th", h) for h in head)}</tr></thead>
<tbody>
{body}
</tbody></table></div>
{f"<h2>Left out</h2><ul>{left_out}</ul>" if left_out else ""}
</body></html>
""",
        encoding="utf8",
    )
