"""The figures of the report as inline SVG: one calm style, text kept as text, colours that follow the page.

Matplotlib draws with the palette below; in the SVG every colour of it becomes a CSS variable, so that the same figure
is right on a light and on a dark page. Ids are prefixed by the figure's name, as many figures share one document.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Rows = Sequence[Mapping[str, Any]]

INK, MUTED, GRID = "#2a3238", "#69757d", "#dcdcd5"
JUDGE, CONTROLLED, GOLD = "#2f6f73", "#b9722c", "#75609f"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", JUDGE: "one", CONTROLLED: "two", GOLD: "three"}
_HEAT = LinearSegmentedColormap.from_list("calm", ["#f6f1e4", "#c4ded2", "#84bfb2", "#4fa39b"])
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}
_WIDE, _HALF = 7.2, 4.4  # inches
_MAX_POINTS = 300


class Drawing:
    """A figure that is drawn inside a `with` block; `svg` is there once it is left."""

    def __init__(self, name: str, alt: str, width: float, height: float, rows: int = 1, columns: int = 1) -> None:
        self.name, self.alt = name, alt
        self._shape = (width, height, rows, columns)
        self._context = rc_context({**_STYLE, "svg.hashsalt": name})
        self.svg = Markup("")

    def __enter__(self) -> list[Axes]:
        self._context.__enter__()
        width, height, rows, columns = self._shape
        self._figure = Figure(figsize=(width, height), layout="constrained")
        return list(self._figure.subplots(rows, columns, squeeze=False).flat)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            buffer = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self._figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
            self.svg = _inline(buffer.getvalue(), self.name, self.alt)
        self._context.__exit__(kind, error, trace)


def _inline(svg: str, name: str, alt: str) -> Markup:
    """The <svg> element alone, with a label, ids of its own, and the page's colours."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r'(\sid=")', rf"\1{name}-", body)
    body = re.sub(r"(url\(#|href=\"#)", rf"\1{name}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return Markup(body.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))


def win_rates(series: Mapping[str, Rows], policies: Sequence[str], n: str) -> Markup:
    """Dots with 95 % intervals, policies from top to bottom.

    Args:
        series: label to a row per policy, each with `rate`, `low`, `high`, or an empty row.
    """
    said = "; ".join(
        f"{label}: " + ", ".join(f"{p} {_spoken(row)}" for p, row in zip(policies, rows, strict=True) if row)
        for label, rows in series.items()
    )
    drawing = Drawing("win-rate", f"Win rates with 95 % intervals. {said}.", _WIDE, 1.25 + 0.55 * len(policies))
    with drawing as (ax,):
        offsets = 0.22 * (np.arange(len(series)) - (len(series) - 1) / 2)
        for offset, (label, rows), colour, mark in zip(
            offsets, series.items(), (JUDGE, CONTROLLED, GOLD), "osD", strict=False
        ):
            there = [(i + offset, row) for i, row in enumerate(rows) if row]
            rates = np.array([[row["rate"], row["low"], row["high"]] for _, row in there]) * 100
            spread = np.abs(rates[:, 1:] - rates[:, :1]).T
            ax.errorbar(
                rates[:, 0],
                [y for y, _ in there],
                xerr=spread,
                fmt=mark,
                color=colour,
                ms=5,
                lw=1.5,
                label=label,
            )
        ax.axvline(50, color=MUTED, ls="--", lw=1)
        ax.set(xlim=(0, 100), ylim=(len(policies) - 0.5, -0.5), xlabel=f"win rate in % of speeches (n = {n})")
        ax.set_yticks(range(len(policies)), policies)
        ax.grid(axis="y", visible=False)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series))
    return drawing.svg


def _spoken(row: Mapping[str, float]) -> str:
    return f"{row['rate']:.0%} ({row['low']:.0%} to {row['high']:.0%})"


def reliability(bins: Rows, n: int) -> Markup:
    """Accuracy against confidence; a dot's area is its share of the pairs."""
    said = ", ".join(f"sure by {b['confidence']:.0%}: right {b['accuracy']:.0%} (n = {b['n']})" for b in bins)
    drawing = Drawing("reliability", f"Reliability of the reward model. {said}.", _HALF, 3.2)
    with drawing as (ax,):
        ax.plot([50, 100], [50, 100], color=MUTED, ls="--", lw=1)
        x, y = ([100 * b[key] for b in bins] for key in ("confidence", "accuracy"))
        ax.plot(x, y, color=JUDGE, lw=1, alpha=0.6)
        ax.scatter(x, y, s=[20 + 220 * b["n"] / n for b in bins], color=JUDGE, clip_on=False, zorder=3)
        lowest = min(50.0, *y) if y else 50.0
        ax.set(
            xlim=(49, 101),
            ylim=(lowest - 2, 103),
            xlabel="how sure the model is, %",
            ylabel="how often right, %",
        )
        ax.set_title(f"n = {n:,} test pairs")
    return drawing.svg


def bars(name: str, alt: str, labels: Sequence[str], values: Sequence[float | None], title: str) -> Markup:
    """Horizontal bars between -1 and 1, each with its figure; None is written out."""
    said = ", ".join(f"{k} {'unknown' if v is None else f'{v:.2f}'}" for k, v in zip(labels, values, strict=True))
    drawing = Drawing(name, f"{alt} {said}.", _HALF, 0.9 + 0.29 * len(labels))
    with drawing as (ax,):
        heights = [v or 0.0 for v in values]
        colours = [GOLD if label == "overall" else JUDGE for label in labels]
        ax.barh(range(len(labels)), heights, color=colours, height=0.62)
        for i, value in enumerate(values):
            text = "no spread" if value is None else f"{value:.2f}"
            ax.text(max(heights[i], 0) + 0.015, i, text, va="center", fontsize=8.5)
        ax.set(xlim=(min(0.0, *heights), 1.12), ylim=(len(labels) - 0.4, -0.6))
        ax.set_xticks([t for t in (-1, -0.5, 0, 0.5, 1) if t >= min(0.0, *heights)])
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        ax.set_title(title)
    return drawing.svg


def calibration(found: Mapping[str, Any]) -> Markup:
    """Weighted kappa per principle with its interval; beside it the order of pairs by their true gap."""
    rows = {name: row for name, row in found["principles"].items() if row.get("kappa") is not None}
    pairs = found["pairs"]
    said = ", ".join(f"{name} {row['kappa']:.2f}" for name, row in rows.items())
    ordered = ", ".join(f"from a gap of {row['gap']:g} {row['agreement']:.0%} (n = {row['n']})" for row in pairs)
    alt = f"The judge against people. Weighted kappa: {said}. Pairs ordered as people do: {ordered}."
    drawing = Drawing("calibration", alt, _WIDE, 3.1, 1, 2)
    with drawing as (left, right):
        _intervals(left, [(row["kappa"], row["kappa_low"], row["kappa_high"]) for row in rows.values()])
        left.set(ylim=(len(rows) - 0.5, -0.5), xlabel="quadratic-weighted κ")
        left.set_yticks(range(len(rows)), list(rows))
        left.set_title(f"n = {found['n']:,} responses")
        _intervals(right, [(100 * row["agreement"], 100 * row["low"], 100 * row["high"]) for row in pairs])
        right.axvline(50, color=MUTED, ls="--", lw=1)
        labels = [
            (f"≥ {row['gap']:g}" if row["below"] is None else f"{row['gap']:g}–{row['below']:g}")
            + f" (n = {row['n']:,})"
            for row in pairs
        ]
        right.set(ylim=(max(1, len(pairs)) - 0.5, -0.5), xlabel="% of pairs ordered as people do")
        right.set_yticks(range(len(pairs)), labels)
        right.set_title("by the true gap of the pair")
    return drawing.svg


def _intervals(ax: Axes, rows: Sequence[tuple[float, float, float]]) -> None:
    """Dots with intervals, from top to bottom."""
    values = np.array(rows, dtype=float).reshape(-1, 3)
    spread = np.abs(values[:, 1:] - values[:, :1]).T
    ax.errorbar(values[:, 0], range(len(values)), xerr=spread, fmt="o", color=JUDGE, ms=5, lw=1.5)
    ax.grid(axis="y", visible=False)


def histogram(name: str, alt: str, values: Sequence[float], low: float, high: float, xlabel: str, what: str) -> Markup:
    """Counts of means of seven whole ratings, so a bar per seventh."""
    x = np.asarray(values, dtype=float)
    edges = np.arange(round(low * 7), round(high * 7) + 2) / 7 - 1 / 14
    counts, _ = np.histogram(np.clip(x, edges[0], edges[-1]), edges)
    said = f"{alt} n = {x.size:,}, mean {x.mean():.2f}, median {np.median(x):.2f}."
    drawing = Drawing(name, said, _HALF, 2.9)
    with drawing as (ax,):
        ax.bar(edges[:-1] + 1 / 14, counts, width=1 / 7 * 0.86, color=JUDGE)
        ax.axvline(float(x.mean()), color=CONTROLLED, lw=1.4, ls="--")
        ax.set(xlim=(edges[0], edges[-1]), xlabel=xlabel, ylabel=what)
        ax.grid(axis="x", visible=False)
        ax.set_title(f"n = {x.size:,}, mean {x.mean():.2f} (dashed)")
    return drawing.svg


def differences(name: str, alt: str, edges: Sequence[float], counts: Sequence[int], xlabel: str, what: str) -> Markup:
    """Counts in bins of equal width on both sides of 0, which is marked."""
    x, y = np.asarray(edges, dtype=float), np.asarray(counts, dtype=float)
    middle, n = (x[:-1] + x[1:]) / 2, int(y.sum())
    mean = float(middle @ y / max(n, 1))
    above = float(y[middle > 0].sum() / max(n, 1))
    drawing = Drawing(name, f"{alt} n = {n:,}, mean about {mean:.0f}, above 0 about {above:.0%}.", _HALF, 2.9)
    with drawing as (ax,):
        ax.bar(middle, y, width=0.86 * (x[1] - x[0]), color=[JUDGE if m > 0 else CONTROLLED for m in middle])
        ax.axvline(0, color=MUTED, lw=1, ls="--")
        ax.set(xlim=(x[0], x[-1]), xlabel=xlabel, ylabel=what)
        ax.grid(axis="x", visible=False)
        ax.set_title(f"n = {n:,}")
    return drawing.svg


def loss_curves(histories: Mapping[str, Rows]) -> Markup:
    """Loss per optimizer step, a panel a training; the faint line is each step, the strong one its running mean."""
    columns = min(2, len(histories))
    rows = -(-len(histories) // columns)
    said = "; ".join(f"{k}: {_ends([row['loss'] for row in h])} in {len(h):,} steps" for k, h in histories.items())
    drawing = Drawing("loss", f"Loss per step. {said}.", _WIDE, 0.3 + 2.0 * rows, rows, columns)
    with drawing as axes:
        for ax, (name, history) in zip(axes, histories.items(), strict=False):
            _curve(ax, [row["loss"] for row in history], JUDGE)
            _mark_rounds(ax, history)
            ax.set_title(f"{name} ({len(history):,} steps)")
            ax.set_ylabel("loss")
        for ax in axes[len(histories) :]:
            ax.set_axis_off()
        for ax in axes[max(0, len(histories) - columns) : len(histories)]:
            ax.set_xlabel("optimizer step")
    return drawing.svg


def reward_curves(histories: Mapping[str, Rows]) -> Markup:
    """Implicit rewards of chosen and rejected responses; both may fall, and a falling chosen one is a warning."""
    said = "; ".join(
        f"{k}: chosen {_ends([r['reward_chosen'] for r in h])}, rejected {_ends([r['reward_rejected'] for r in h])}"
        for k, h in histories.items()
    )
    drawing = Drawing("rewards", f"Implicit rewards per step. {said}.", _WIDE, 2.7, 1, len(histories))
    with drawing as axes:
        for ax, (name, history) in zip(axes, histories.items(), strict=True):
            _curve(ax, [row["reward_chosen"] for row in history], JUDGE, "chosen")
            _curve(ax, [row["reward_rejected"] for row in history], CONTROLLED, "rejected")
            ax.axhline(0, color=MUTED, ls="--", lw=1)
            _mark_rounds(ax, history)
            ax.set(xlabel="optimizer step")
            ax.set_title(f"{name} ({len(history):,} steps)")
        axes[0].set_ylabel("implicit reward")
        axes[0].legend(loc="best")
    return drawing.svg


def _ends(values: Sequence[float]) -> str:
    return f"{values[0]:.2f} to {values[-1]:.2f}"


def _curve(ax: Axes, values: Sequence[float], colour: str, label: str | None = None) -> None:
    y = np.asarray(values, dtype=float)
    steps = np.arange(1, y.size + 1, dtype=float)
    if y.size > _MAX_POINTS:
        blocks = np.array_split(np.arange(y.size), _MAX_POINTS)
        y, steps = (np.array([v[block].mean() for block in blocks]) for v in (y, steps))
    width = max(1, y.size // 12)
    kernel = np.ones(width)
    smooth = np.convolve(y, kernel, "same") / np.convolve(np.ones(y.size), kernel, "same")
    ax.plot(steps, y, color=colour, lw=0.8, alpha=0.35)
    ax.plot(steps, smooth, color=colour, label=label)


def _mark_rounds(ax: Axes, history: Rows) -> None:
    """A line where an online round begins."""
    rounds = [row.get("round", 0) for row in history]
    for step in range(1, len(rounds)):
        if rounds[step] != rounds[step - 1]:
            ax.axvline(step + 0.5, color=MUTED, lw=0.8, ls=":")


def online_rounds(rounds: Rows) -> Markup:
    """What was watched of the samples of each round (`training.online.watch`), and after it.

    The band around the mean score is the standard deviation of the samples of one speech, what pairs are made of.
    """
    said = ", ".join(f"round {r['round'] + 1}: score {r['mean_score']:.2f}, {r['mean_chars']:.0f}" for r in rounds)
    panels: list[tuple[str, list[tuple[str, str, str]]]] = [
        ("score", [("mean_score", "mean of samples", JUDGE), ("best_score", "best of a speech", MUTED),
                   ("dev_score", "dev, after the round", GOLD)]),
        ("held-out judge, 1 to 5", [("gold_score", "", GOLD)]),
        ("mean length in characters", [("mean_chars", "", CONTROLLED)]),
        ("log-ratio to the first policy", [("kl", "", GOLD)]),
        ("entropy, nats a token", [("entropy", "", GOLD)]),
        ("share", [("tie_share", "speeches that tie", JUDGE), ("floor_share", "unsafe samples", GOLD),
                   ("cut_share", "samples cut off", MUTED)]),
    ]  # fmt: skip
    rounds = _with_shares(rounds)
    panels = [panel for panel in panels if any(_known(rounds, key) for key, *_ in panel[1])]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    drawing = Drawing("rounds", f"Online rounds. {said} characters.", _WIDE, 2.3 * lines, lines, columns)
    with drawing as axes:
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax, (title, curves) in zip(axes, panels, strict=False):
            drawn = [(_known(rounds, key), label, colour) for key, label, colour in curves]
            for points, label, colour in drawn:
                if points:
                    ax.plot(*zip(*points, strict=True), "o-", color=colour, ms=5, label=label)
            if title == "score" and all("spread" in row for row in rounds):
                means, spreads = (np.array([row[key] for row in rounds]) for key in ("mean_score", "spread"))
                places = [row["round"] + 1 for row in rounds]
                ax.fill_between(places, means - spreads, means + spreads, color=JUDGE, alpha=0.12, lw=0)
            numbers = [r["round"] + 1 for r in rounds]
            ax.set(xlabel="round", xlim=(0.5, max(numbers) + 0.5))
            ax.set_xticks(numbers[:: max(1, len(numbers) // 10)])
            ax.margins(y=0.25)
            ax.set_title(title)
            if sum(bool(points) for points, *_ in drawn) > 1:
                ax.legend(loc="best")
    return drawing.svg


def _with_shares(rounds: Rows) -> list[dict[str, Any]]:
    """The rounds with counts of their samples as shares; what never happened is no line."""
    names = {"floor_share": "floor_hits", "cut_share": "truncated"}
    happened = {name: key for name, key in names.items() if any(row.get(key) for row in rounds)}
    return [
        {**row, "tie_share": row.get("ties")}
        | {name: row[key] / row["samples"] for name, key in happened.items() if key in row}
        for row in rounds
    ]


def _known(rounds: Rows, key: str) -> list[tuple[float, float]]:
    """(round, value) where the figure was taken."""
    return [(r["round"] + 1, r[key]) for r in rounds if r.get(key) is not None]


def heat_map(
    name: str,
    alt: str,
    table: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    decimals: int,
    limits: tuple[float, float],
) -> Markup:
    """A small table of figures with colour; NaN stays empty. `labels` are those of the rows and the columns."""
    width = min(_WIDE, 1.5 + 0.58 * len(columns))
    size = 8.5 if len(columns) <= 10 else 6.5
    drawing = Drawing(name, alt, width, 1.1 + 0.36 * len(rows))
    with drawing as (ax,):
        low, high = limits
        scaled = np.clip((table - low) / max(high - low, 1e-9), 0, 1)
        ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        for (i, j), share in np.ndenumerate(scaled):
            if np.isnan(share):
                continue
            ax.add_patch(Rectangle((j - 0.48, i - 0.47), 0.96, 0.94, facecolor=to_hex(_HEAT(share)), linewidth=0))
            ax.text(j, i, f"{table[i, j]:,.{decimals}f}", ha="center", va="center", fontsize=size, color="#1b2226")
        ax.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(rows)), rows)
        ax.set(ylabel=labels[0], xlabel=labels[1])
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    return drawing.svg
