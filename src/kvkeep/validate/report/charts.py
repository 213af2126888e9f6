"""Five kinds of plot as inline SVG: no script, no font, no image, nothing to fetch.

Each is drawn at the width of a telephone and grows with its place, so that its texts stay legible.
Colors are classes (``s0`` .. ``s7`` for series, ``v-...`` for verdicts) that the page's style knows
in a light and a dark form. Every mark that stands for one thing says what in a tooltip.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvkeep.validate.report.marks import Element, mark, text_of

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 8, 40
SERIES_MAX = 8
"""Colors that can be told apart; further series begin again."""
LOG_RATIO = 30.0
"""An axis whose largest value is so many times its smallest is logarithmic."""
POINTS_MAX = 2000
"""Of a series; beyond it every n-th is drawn: the shape is the same and the page stays small."""
TICKS_MAX = 7
TIME_UNITS = ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "\u00b5s", 1e6))
"""From so many seconds on: the unit that a time is written in, and how many are in a second."""
NAME_CHARS_MAX = 50
"""Of a lane or bar; its tooltips have the rest."""
CELL, CELLS_PER_ROW = 7, 54
LANE_CELLS_MAX = CELLS_PER_ROW * 20
ROW_HEIGHT = 34
SEVERITY = (
    "identical",
    "near-tie",
    "not-exercised",
    "drift",
    "error",
    "corruption",
    "contamination",
)
"""Verdicts from harmless to fatal: a cell for several requests shows the worst of them."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to places."""

    low: float
    high: float
    start: float
    """Place of ``low``."""
    end: float
    """Place of ``high``."""
    step: float = 0.0
    """Distance of ticks; 0: logarithmic, a tick for each power of ten."""

    @staticmethod
    def over(values: Sequence[float], start: float, end: float, *, may_log: bool) -> "Axis":
        """An axis that shows all of these values, from 0 unless it is logarithmic."""
        above = [value for value in values if value > 0]
        if may_log and above and len(above) == len(values) and max(above) > LOG_RATIO * min(above):
            low, high = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
            return Axis(10.0**low, 10.0**high, start, end)
        most = max(above, default=1.0)
        step = _step(most)
        # Less a hair: a quotient that should be whole may come out above.
        return Axis(0.0, math.ceil(most / step - 1e-9) * step, start, end, step)

    def at(self, value: float) -> float:
        """Place of a value; what lies outside is drawn at the edge."""
        value = min(max(value, self.low), self.high)
        if not self.step:
            share = math.log10(value / self.low) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def time_of(self, seconds: float) -> str:
        """A tick's text: in the unit of the whole axis, or in its own on a logarithmic one."""
        decisive = self.high if self.step else seconds
        unit, per_second = next(row[1:] for row in TIME_UNITS if decisive >= row[0] * (1 - 1e-9))
        return text_of(seconds * per_second, f" {unit}")

    def ticks(self) -> list[float]:
        """Values that are written beside it."""
        if not self.step:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            # Of very many powers as many as there is room for.
            every = -(-(last - first) // TICKS_MAX) or 1
            return [10.0**power for power in range(first, last + 1, every)]
        return [self.step * number for number in range(round(self.high / self.step) + 1)]


Written = tuple[Axis, Callable[[float], str]]
"""An axis, and what is written at a tick of it."""


def _step(high: float) -> float:
    """A round distance of ticks, four to eight of them."""
    power = 10.0 ** math.floor(math.log10(high))
    for part in (0.2, 0.25, 0.5, 1.0):
        if high / (power * part) <= 6:
            return power * part
    return power * 2


def distribution(label: str, series: Mapping[str, Sequence[float]]) -> Element:
    """Share of requests (upwards) that took at most so many seconds (to the right)."""
    everything = [value for values in series.values() for value in values]
    x = Axis.over(everything, LEFT, WIDTH - RIGHT, may_log=True)
    y = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP, 0.25)
    picture = _frame(label, (x, x.time_of), (y, "{:.0%}".format), "time")
    for number, (name, values) in enumerate(series.items()):
        ordered = sorted(values)
        steps = [
            (value, (idx + 1) / len(ordered))
            for idx, value in enumerate(ordered)
            if idx % (len(ordered) // POINTS_MAX + 1) == 0 or idx == len(ordered) - 1
        ]
        corners: list[tuple[float, float]] = [(steps[0][0], 0.0)] if steps else []
        for (_, below), (value, share) in pairwise([(0.0, 0.0), *steps]):
            corners += [(value, below), (value, share)]
        places = " ".join(f"{x.at(value)},{y.at(share)}" for value, share in corners)
        line = mark("polyline", points=places, class_=f"line s{number % SERIES_MAX}")
        picture.append(_told(line, f"{name}: {len(ordered)} requests"))
    return picture


def scatter(label: str, series: Mapping[str, Points], across: str) -> Element:
    """One dot for each request: seconds (upwards) by a length (to the right)."""
    dots = [dot for points in series.values() for dot in points]
    x = Axis.over([dot[0] for dot in dots], LEFT, WIDTH - RIGHT, may_log=True)
    y = Axis.over([dot[1] for dot in dots], HEIGHT - BOTTOM, TOP, may_log=True)
    picture = _frame(label, (x, text_of), (y, y.time_of), across)
    for number, (name, points) in enumerate(series.items()):
        for length, seconds in points[:: len(points) // POINTS_MAX + 1]:
            dot = mark(
                "circle",
                cx=x.at(length),
                cy=y.at(seconds),
                r=3,
                class_=f"dot s{number % SERIES_MAX}",
            )
            told = f"{name}: {text_of(length)} {across}, {text_of(seconds)} s"
            picture.append(_told(dot, told))
    return picture


def curves(label: str, series: Mapping[str, Points], across: str) -> Element:
    """One line for each series: values (upwards) by a number (to the right)."""
    points = [point for each in series.values() for point in each]
    x = Axis.over([point[0] for point in points], LEFT, WIDTH - RIGHT, may_log=False)
    y = Axis.over([point[1] for point in points], HEIGHT - BOTTOM, TOP, may_log=True)
    picture = _frame(label, (x, text_of), (y, text_of), across)
    for number, (name, line) in enumerate(series.items()):
        shown = line[:: len(line) // POINTS_MAX + 1]
        places = " ".join(f"{x.at(along)},{y.at(value)}" for along, value in shown)
        drawn = mark("polyline", points=places, class_=f"line s{number % SERIES_MAX}")
        picture.append(_told(drawn, name))
    return picture


def shares(label: str, rows: Mapping[str, Mapping[str, float]], parts: Sequence[str]) -> Element:
    """One bar for each row, cut into parts; equal parts have one color in all rows."""
    height = ROW_HEIGHT * len(rows) + 4
    picture = _picture(label, height)
    for row_idx, (name, values) in enumerate(rows.items()):
        top = ROW_HEIGHT * row_idx
        whole = sum(values.values())
        picture.append(mark("text", name[:NAME_CHARS_MAX], x=2, y=top + 13, class_="name"))
        left = 2.0
        for number, part in enumerate(parts):
            share = values.get(part, 0.0) / whole if whole else 0.0
            width = round(share * (WIDTH - 4), 1)
            if not width:
                continue
            place = {"x": round(left, 1), "y": top + 17, "width": width, "height": 13}
            bar = mark("rect", class_=f"bar s{number}", **place)
            picture.append(_told(bar, f"{name}: {share:.1%} {part} ({text_of(values[part])})"))
            left += width
    return picture


def timeline(label: str, lanes: Mapping[str, Sequence[tuple[str, str]]]) -> Element:
    """One cell for each request, in the order they were asked; a lane for each phase.

    Args:
        label: What a screen reader says.
        lanes: By phase, for each request its verdict and what its cell says.
    """
    cells: list[Element] = []
    top = 0
    for name, requests in lanes.items():
        cells.append(mark("text", name[:NAME_CHARS_MAX], x=2, y=top + 12, class_="name"))
        merged = _merged(requests)
        for idx, (verdict, told) in enumerate(merged):
            row, column = divmod(idx, CELLS_PER_ROW)
            place = {"x": 2 + column * CELL, "y": top + 17 + row * CELL}
            cell = mark(
                "rect", class_=f"cell v-{verdict}", width=CELL - 1, height=CELL - 1, **place
            )
            cells.append(_told(cell, told))
        top += 17 + CELL * -(-len(merged) // CELLS_PER_ROW) + 6
    picture = _picture(label, top)
    picture.extend(cells)
    return picture


def _merged(requests: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """At most ``LANE_CELLS_MAX`` cells; one for several requests is as bad as the worst of them."""
    step = -(-len(requests) // LANE_CELLS_MAX) or 1
    if step == 1:
        return list(requests)
    groups = [requests[start : start + step] for start in range(0, len(requests), step)]
    worst = [max(group, key=lambda request: SEVERITY.index(request[0])) for group in groups]
    return [(verdict, f"worst of {step}: {told}") for verdict, told in worst]


def legend(names: Sequence[str], prefix: str = "s") -> Element:
    """The colors' names; ``prefix`` is that of their classes."""
    entries = []
    for number, name in enumerate(names):
        key = f"{prefix}{number % SERIES_MAX}" if prefix == "s" else f"{prefix}{name}"
        entries.append(mark("li", mark("span", class_=f"key {key}"), name))
    return mark("ul", *entries, class_="legend")


def _picture(label: str, height: float) -> Element:
    return mark("svg", viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label, class_="plot")


def _frame(label: str, x: Written, y: Written, across: str) -> Element:
    """A picture with both axes and their grid."""
    picture = _picture(label, HEIGHT)
    axis, written = y
    for value in axis.ticks():
        place = axis.at(value)
        picture.append(mark("line", x1=LEFT, x2=WIDTH - RIGHT, y1=place, y2=place, class_="grid"))
        picture.append(mark("text", written(value), x=LEFT - 5, y=place + 4, class_="tick end"))
    axis, written = x
    below = HEIGHT - BOTTOM + 15
    for value in axis.ticks():
        place = axis.at(value)
        picture.append(mark("line", x1=place, x2=place, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        picture.append(mark("text", written(value), x=place, y=below, class_="tick middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    picture.append(mark("text", across, x=middle, y=HEIGHT - 6, class_="tick middle"))
    return picture


def _told(element: Element, text: str) -> Element:
    element.append(mark("title", text))
    return element
