"""The series of a run as a plot in SVG, for docs/: `python -m benchmarks.plot [FILE] > docs/images/slow-stage.svg`."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from benchmarks.markdown import LATEST

Points = Sequence[Sequence[float]]

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 62, 48
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: for all eyes
APART = 2.5  # pixels between lines that would lie on each other
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
TICKS_MAX = 10


def steps_plot(title: str, series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Each of `series`, points (x, y) with y from 0 on, as a line of steps: a value holds until the next one."""
    x_max = max(x for points in series.values() for x, _ in points)
    y_max = max(1.0, *(y for points in series.values() for _, y in points))
    frame = _Frame(x_max, y_max)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
        *frame.grid(x_label, y_label),
        *itertools.chain(*(frame.line(index, *item) for index, item in enumerate(series.items()))),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


class _Frame:
    """From values to pixels."""

    def __init__(self, x_max: float, y_max: float) -> None:
        self._x_max, self._y_max = x_max, y_max

    def x(self, value: float) -> float:
        return LEFT + value / self._x_max * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self._y_max * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_label: str, y_label: str) -> list[str]:
        found = []
        for value in _ticks(self._y_max):
            y = self.y(value)
            found.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
            found.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
        for value in _ticks(self._x_max):
            found.append(
                f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value}</text>'
            )
        middle = (TOP + HEIGHT - BOTTOM) / 2
        found.append(
            f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>'
        )
        found.append(
            f'<text x="16" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 16 {middle:.0f})">'
            f"{escape(y_label)}</text>"
        )
        return found

    def line(self, index: int, name: str, points: Points) -> list[str]:
        """The line and its entry in the legend, which lies above the plot."""
        colour, shift = COLOURS[index % len(COLOURS)], index * APART
        pixels = [(self.x(x), self.y(y) - shift) for x, y in points]
        path = f"M{pixels[0][0]:.1f} {pixels[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in pixels[1:])
        at = LEFT + index * 200
        return [
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<path d="M{at} 42h22" stroke="{colour}" stroke-width="3"/>',
            f'<text x="{at + 28}" y="46">{escape(name)}</text>',
        ]


def _ticks(greatest: float) -> range:
    """Round numbers from 0 to `greatest`, not too many of them."""
    step = next((step for step in STEPS if greatest / step <= TICKS_MAX), STEPS[-1])
    return range(0, math.floor(greatest) + 1, step)


def main(file: Path = LATEST) -> None:
    found: dict[str, dict[str, Points]] = json.loads(file.read_text())["series"]
    if not found:
        sys.exit(f"error: {file} holds no series; make them by `python -m benchmarks --only slow`")
    title, series = next(iter(found.items()))
    print(steps_plot(title, series, "seconds", "ready replicas"), end="")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
