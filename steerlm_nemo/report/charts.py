"""Small charts as SVG: nothing to import, and nothing that a page would have to fetch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

COLOURS = ("#1f5fa8", "#c2501c", "#3b7d3b", "#7a4aa3")
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 36  # margins in pixels


@dataclass(frozen=True)
class Line:
    """Points (x, y, interval of y or None) joined in order."""

    name: str
    points: Sequence[tuple[float, float, tuple[float, float] | None]]


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    limits: tuple[float, float] | None = None,
    width: int = 320,
    height: int = 240,
) -> Markup:
    """An SVG. With `limits` both axes run over them, in whole steps, with a dashed diagonal; else over the data."""
    xs = [x for line in lines for x, _, _ in line.points] or [0.0]
    ys = [y for line in lines for _, y, _ in line.points] or [0.0]
    x_low, x_high = limits or (min(xs), max(xs))
    y_low, y_high = limits or (0.0, max(ys))

    def px(x: float) -> float:
        return round(_LEFT + (x - x_low) / ((x_high - x_low) or 1) * (width - _LEFT - _RIGHT), 1)

    def py(y: float) -> float:
        return round(height - _BOTTOM - (y - y_low) / ((y_high - y_low) or 1) * (height - _TOP - _BOTTOM), 1)

    num_steps = int(x_high - x_low) if limits and x_high - x_low <= 10 else 4
    marks = []
    for i in range(num_steps + 1):
        x, y = x_low + (x_high - x_low) * i / num_steps, y_low + (y_high - y_low) * i / num_steps
        marks.append(f'<text x="{px(x)}" y="{height - _BOTTOM + 15}" text-anchor="middle">{x:g}</text>')
        marks.append(f'<text x="{_LEFT - 6}" y="{py(y) + 4}" text-anchor="end">{float(f"{y:.3g}"):g}</text>')
        marks.append(f'<path d="M{_LEFT} {py(y)}H{width - _RIGHT}" stroke="#e3e8ef"/>')
    marks.append(f'<text x="{(width + _LEFT) / 2}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    marks.append(
        f'<text transform="translate(11 {height / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    if limits:
        diagonal = f"M{px(x_low)} {py(y_low)}L{px(x_high)} {py(y_high)}"
        marks.append(f'<path d="{diagonal}" stroke="#8a94a3" stroke-dasharray="4 4"/>')
    for line, colour in zip(lines, COLOURS, strict=False):
        path = "M" + "L".join(f"{px(x)} {py(y)}" for x, y, _ in line.points) if line.points else ""
        marks.append(f'<path d="{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        if limits:
            for x, y, interval in line.points:
                marks.append(f'<circle cx="{px(x)}" cy="{py(y)}" r="3.5" fill="{colour}"/>')
                if interval is not None:
                    low, high = (py(min(max(bound, y_low), y_high)) for bound in interval)
                    marks.append(f'<path d="M{px(x)} {low}V{high}" stroke="{colour}" stroke-width="1.5"/>')
    for i, (line, colour) in enumerate(zip(lines, COLOURS, strict=False)):
        if line.name:
            y = _TOP + 14 * (i + 1)
            marks.append(f'<text x="{width - 20}" y="{y}" text-anchor="end" fill="{colour}">{escape(line.name)}</text>')
    return _svg(width, height, marks)


def _svg(width: int, height: int, drawn: Iterable[str]) -> Markup:
    """Markup, so that a page takes it as it is: all texts in it are escaped."""
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-size="11" '
        f'font-family="sans-serif" role="img">{"".join(drawn)}</svg>'
    )


def bar_chart(
    bars: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    x_label: str,
    y_label: str,
    *,
    width: int = 320,
    height: int = 200,
) -> Markup:
    """An SVG: for each label a group of bars, one per name in `bars`, side by side. Heights are shares from 0 to 1."""
    highest = max((share for shares in bars.values() for share in shares), default=0.0) or 1.0
    room = (width - _LEFT - _RIGHT) / max(len(labels), 1)
    bar = room * 0.8 / max(len(bars), 1)
    drawn = []
    for i in range(5):
        y = round(height - _BOTTOM - i / 4 * (height - _TOP - _BOTTOM), 1)
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{highest * i / 4:.0%}</text>')
        drawn.append(f'<path d="M{_LEFT} {y}H{width - _RIGHT}" stroke="#e3e8ef"/>')
    widest = 10 + 7 * max(map(len, labels), default=0)  # pixels; labels must not run into each other
    every = -(-len(labels) * widest // (width - _LEFT - _RIGHT))
    for i, label in enumerate(labels):
        x = _LEFT + room * (i + 0.5)
        if i % every == 0:
            drawn.append(f'<text x="{x:.1f}" y="{height - _BOTTOM + 15}" text-anchor="middle">{escape(label)}</text>')
        for j, (name, shares) in enumerate(bars.items()):
            tall = shares[i] / highest * (height - _TOP - _BOTTOM)
            left = x - room * 0.4 + bar * j
            drawn.append(
                f'<rect x="{left:.1f}" y="{height - _BOTTOM - tall:.1f}" width="{max(bar - 1, 1):.1f}" '
                f'height="{tall:.1f}" fill="{COLOURS[j % len(COLOURS)]}"><title>{escape(name)}, {escape(label)}: '
                f"{shares[i]:.1%}</title></rect>"
            )
    drawn.append(f'<text x="{(width + _LEFT) / 2}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    drawn.append(
        f'<text transform="translate(9 {height / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return _svg(width, height, drawn)
