# SPDX-License-Identifier: GPL-2.0-or-later
"""A picture of how a thin disk grew, as SVG: what the guest wrote against the size of its volume.

Colours are classes with two sets of values, so that the picture suits pages of both schemes; it
brings its own background, for a page may not have the scheme that its reader's browser says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any, Final

from vdsm_storage.cli.points import (
    BEGINS,
    BYTE_UNITS,
    TIME_UNITS,
    Row,
    Span,
    rows_of,
    spans_of,
    summary,
)

WIDTH: Final = 880
HEIGHT: Final = 440
LEFT, RIGHT, TOP, BOTTOM = 66, 856, 96, 384  # of the plot itself

# (name, light, dark); lines are stroked, spans are filled.
LINES: Final = (
    ("size", "#bc4c00", "#f0883e"), ("limit", "#1a7f37", "#3fb950"),
    ("written", "#0969da", "#58a6ff"),
)  # fmt: skip
SPANS: Final = (
    ("paused", "#cf222e", "#f85149"), ("slowed", "#bf8700", "#d29922"),
    ("full", "#8250df", "#a371f7"),
)  # fmt: skip
PLAIN: Final = (
    ("back", "#ffffff", "#0d1117"), ("ink", "#1f2328", "#e6edf3"), ("soft", "#59636e", "#9198a1"),
)  # fmt: skip
GRID: Final = ("grid", "#d1d9e0", "#30363d")
SPAN_OPACITY: Final = 0.3
NARROWEST: Final = 1.5  # pixels of a span, so that a short one is seen

LEGEND: Final[Mapping[str, str]] = {
    "written": "written by the guest", "size": "size of the volume", "limit": "threshold",
    "paused": "guest paused", "slowed": "guest slowed", "full": "no space in the group",
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """From values to pixels; `ticks` are values that have a label, which counts `unit`s, each of
    `factor`."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    unit: str
    factor: float

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def plot(points: Sequence[Mapping[str, Any]], title: str) -> str:
    """SVG of `points` as VM.getThinHistory tells them (schema: ThinPoint; bytes may be numbers or
    strings), in any order.  ValueError without any."""
    rows = rows_of(points)
    title = "".join(letter if letter.isprintable() else " " for letter in title)
    across, up = time_scale(rows[0].when, rows[-1].when), byte_scale(rows)
    spans = spans_of(rows)
    parts = [*_frame(across, up, rows[0].when), *_shades(across, spans)]
    parts += _lines(across, up, rows)
    parts += _words(title, summary(rows, spans))
    parts += _legend([name for name, *_ in (*LINES, *SPANS) if _occurs(name, rows, spans)])
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="12">'
    )
    shown = [head, f"<title>{escape(title)}</title>", f"<style>{_style()}</style>", *parts]
    return "\n".join([*shown, "</svg>", ""])


# -- axes ----------------------------------------------------------------------------------------


def time_scale(first: float, last: float) -> Scale:
    """From the first point to the last one, which is later."""
    unit, factor = next((u, f) for u, f, enough in TIME_UNITS if last - first >= enough)
    rough = (last - first) / factor / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * 0.999)
    count = int((last - first) / factor / step + 1e-9)
    ticks = [first + number * step * factor for number in range(count + 1)]
    return Scale(first, last, LEFT, RIGHT, ticks, unit, factor)


def byte_scale(rows: Sequence[Row]) -> Scale:
    """From 0, unless all of it lies far above; steps are powers of two."""
    values = [row.written for row in rows]
    values += [value for row in rows for value in (row.size, row.limit) if value]
    low, high = min(values), max(values)
    if low < 0.6 * high or high - low < high / 1000:
        low = 0
    step = 1 << max(0, math.ceil(math.log2(max(1, high - low) / 7)))
    first, last = low // step, -(-high // step)
    last = max(last, first + 1)
    ticks = [number * step for number in range(first, last + 1)]
    unit, factor = next(((u, f) for u, f in BYTE_UNITS if last * step >= f), ("bytes", 1))
    return Scale(first * step, last * step, BOTTOM, TOP, ticks, unit, factor)


# -- SVG -----------------------------------------------------------------------------------------


def _style() -> str:
    """Light values, and dark ones for readers who like it dark."""
    return _rules(0) + "@media(prefers-color-scheme:dark){" + _rules(1) + "}"


def _rules(scheme: int) -> str:
    fills = "".join(f".{name}{{fill:{values[scheme]}}}" for name, *values in (*PLAIN, *SPANS))
    lines = (*LINES, GRID)
    strokes = "".join(f".{name}{{stroke:{values[scheme]}}}" for name, *values in lines)
    return fills + strokes + f".under{{fill:{LINES[2][1 + scheme]}}}"


def _text(x: float, y: float, words: str, extra: str = "", kind: str = "soft") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{extra}>{escape(words)}</text>'


def _frame(across: Scale, up: Scale, first: float) -> Iterator[str]:
    """Background, grid, and the axes with their units."""
    yield f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    for tick in up.ticks:
        y = up(tick)
        yield f'<path class="grid" fill="none" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        yield _text(LEFT - 8, y + 4, f"{tick / up.factor:.10g}", ' text-anchor="end"')
    for tick in across.ticks:
        x, label = across(tick), round((tick - first) / across.factor, 6)
        yield f'<path class="grid" fill="none" d="M{x:.1f} {BOTTOM}v5"/>'
        yield _text(x, BOTTOM + 19, f"{label:.10g}", ' text-anchor="middle"')
    began = datetime.fromtimestamp(first, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    middle = (LEFT + RIGHT) / 2
    yield _text(middle, BOTTOM + 40, f"{across.unit} since {began}", ' text-anchor="middle"')
    yield _text(LEFT - 8, TOP - 14, up.unit, ' text-anchor="end"')


def _words(title: str, told: str) -> Iterator[str]:
    yield _text(24, 32, title, ' font-size="17" font-weight="600"', "ink")
    yield _text(24, 52, told, ' font-size="13"')


def _shades(across: Scale, spans: Sequence[Span]) -> Iterator[str]:
    for span in spans:
        width = max(NARROWEST, across(span.end) - across(span.start))
        x = min(across(span.start), RIGHT - width)
        yield _box(span.name, f'x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{BOTTOM - TOP}"')


def _box(name: str, place: str) -> str:
    return f'<rect class="{name}" fill-opacity="{SPAN_OPACITY}" {place}/>'


def _lines(across: Scale, up: Scale, rows: Sequence[Row]) -> Iterator[str]:
    written = _slope([(across(row.when), up(row.written)) for row in rows])
    closed = f"{written}V{BOTTOM}H{across(rows[0].when):.1f}Z"
    yield f'<path class="under" stroke="none" fill-opacity="0.12" d="{closed}"/>'
    sizes = [(across(row.when), up(row.size) if row.size else None) for row in rows]
    limits = [(across(row.when), up(row.limit) if row.limit else None) for row in rows]
    yield f'<path class="limit" {_dash("limit")} d="{_steps(limits)}"/>'
    yield f'<path class="size" {_dash("size")} d="{_steps(sizes)}"/>'
    yield f'<path class="written" {_dash("written")} stroke-linejoin="round" d="{written}"/>'


def _dash(name: str) -> str:
    more = ' stroke-dasharray="5 3"' if name == "limit" else ""
    return f'fill="none" stroke-width="{1.3 if name == "limit" else 2}"{more}'


def _slope(places: Sequence[tuple[float, float]]) -> str:
    """A line through all; what would not be seen is left out."""
    x, y = places[0]
    path = [f"M{x:.1f} {y:.1f}"]
    for index, (right, there) in enumerate(places[1:], 2):
        if index == len(places) or max(abs(right - x), abs(there - y)) >= 0.4:
            path.append(f"L{right:.1f} {there:.1f}")
            x, y = right, there
    return "".join(path)


def _steps(places: Sequence[tuple[float, float | None]]) -> str:
    """Each value holds until the next one; there is a gap where there is none."""
    path: list[str] = []
    level: float | None = None
    for x, y in places:
        if y == level:
            continue
        if level is not None:
            path.append(f"H{x:.1f}")
        if y is not None:
            path.append(f"M{x:.1f} {y:.1f}" if level is None else f"V{y:.1f}")
        level = y
    if level is not None:
        path.append(f"H{places[-1][0]:.1f}")
    return "".join(path)


def _occurs(name: str, rows: Sequence[Row], spans: Sequence[Span]) -> bool:
    if name == "limit":
        return any(row.limit for row in rows)
    return name in ("written", "size") or any(span.name == name for span in spans)


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = float(LEFT)
    for name in names:
        if name in BEGINS.values():
            yield _box(name, f'x="{x:.1f}" y="65" width="20" height="11"')
        else:
            yield f'<path class="{name}" {_dash(name)} d="M{x:.1f} 70.5h20"/>'
        yield _text(x + 26, 75, LEGEND[name], kind="ink")
        x += 26 + 6.6 * len(LEGEND[name]) + 18
