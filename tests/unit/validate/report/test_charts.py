"""Plots show every value inside their frame, and say in words what they show."""

import pytest

from kvkeep.validate.report.charts import (
    BOTTOM,
    HEIGHT,
    LANE_CELLS_MAX,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    curves,
    distribution,
    legend,
    scatter,
    shares,
    timeline,
)
from kvkeep.validate.report.marks import Element


def of_class(picture: Element, name: str) -> list[Element]:
    return [each for each in picture.iter() if name in (each.get("class") or "").split()]


@pytest.mark.parametrize("values", [[0.01], [0.0, 5.0], [0.001, 40.0], [3.0, 3.0], [1e-9, 1e9]])
def test_a_distribution_stays_in_its_frame(values: list[float]) -> None:
    """Whatever the values, the line lies between the axes and ends at the top."""
    (line,) = of_class(distribution("d", {"p": values}), "line")

    corners = [tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()]
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in corners)
    assert corners[-1][1] == TOP


def test_a_distribution_rises_at_its_values() -> None:
    """Half of two values lie at or below the first."""
    (line,) = of_class(distribution("d", {"p": [1.0, 2.0]}), "line")

    corners = [tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()]
    axis = Axis.over([1.0, 2.0], LEFT, WIDTH - RIGHT, may_log=True)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    assert (axis.at(1.0), middle) in corners


def test_a_dot_for_each_request() -> None:
    """Longer prompts lie further right, slower answers higher, and each says what it is."""
    picture = scatter("s", {"p": [(10.0, 1.0), (20.0, 2.0)]}, "tokens")

    short, long = of_class(picture, "dot")
    assert float(short.get("cx", "")) < float(long.get("cx", ""))
    assert float(short.get("cy", "")) > float(long.get("cy", ""))
    assert short[0].text == "p: 10 tokens, 1 s"


def test_a_curve_goes_through_its_points() -> None:
    """Larger values lie higher, later ones further right; each line says whose it is."""
    first, second = of_class(
        curves("c", {"p": [(0, 4.0), (10, 1.0)], "q": [(5, 2.0)]}, "step"), "line"
    )

    (left, high), (right, low) = (
        map(float, pair.split(",")) for pair in (first.get("points") or "").split()
    )
    assert (left, right) == (LEFT, WIDTH - RIGHT)
    assert TOP <= high < low <= HEIGHT - BOTTOM
    assert (first[0].text, second[0].text) == ("p", "q")


def test_bars_are_cut_by_share() -> None:
    """Parts are as wide as their share, and empty ones are not drawn."""
    picture = shares("b", {"p": {"x": 1.0, "y": 3.0, "z": 0.0}}, ["x", "y", "z"])

    widths = [float(bar.get("width", "")) for bar in of_class(picture, "bar")]
    assert widths == pytest.approx([(WIDTH - 4) / 4, 3 * (WIDTH - 4) / 4], abs=0.1)


def test_a_timeline_has_a_cell_for_each_request() -> None:
    """In the order of asking, in the verdict's color."""
    picture = timeline("t", {"p": [("identical", "a"), ("drift", "b")]})

    classes = [cell.get("class") for cell in of_class(picture, "cell")]
    assert classes == ["cell v-identical", "cell v-drift"]


def test_a_failure_is_seen_among_many() -> None:
    """Where one cell stands for several requests it is as bad as the worst of them."""
    requests = [("identical", "a")] * 10_000 + [("contamination", "b")] + [("drift", "c")] * 2

    cells = of_class(timeline("t", {"p": requests}), "cell")

    assert len(cells) <= LANE_CELLS_MAX
    assert "v-contamination" in (cells[-1].get("class") or "")


def test_every_plot_has_a_name_for_readers_of_the_screen() -> None:
    """A picture without words says nothing to somebody who can't see it."""
    pictures = [
        distribution("a", {}),
        scatter("a", {}, "x"),
        shares("a", {}, []),
        timeline("a", {}),
    ]

    assert [(each.get("role"), each.get("aria-label")) for each in pictures] == [("img", "a")] * 4


def test_a_legend_names_its_colors() -> None:
    """A key of the color's class, and the name beside it."""
    (entry,) = legend(["phase 1"])

    assert entry[0].get("class") == "key s0"
    assert entry[0].tail == "phase 1"


@pytest.mark.parametrize("high", [0.003, 0.04, 1.0, 7.0, 52.0, 900.0])
def test_ticks_are_round_and_few(high: float) -> None:
    """An axis has three to eight ticks, the last of them at or above every value."""
    axis = Axis.over([high], 0, 100, may_log=True)

    assert 3 <= len(axis.ticks()) <= 8
    assert axis.ticks()[-1] == pytest.approx(axis.high)
    assert axis.high >= high


@pytest.mark.parametrize("most", [10.0**power for power in range(-6, 4)])
@pytest.mark.parametrize("part", [0.13, 0.3, 0.76, 1.0])
def test_times_are_written_short(most: float, part: float) -> None:
    """Engines that answer in microseconds or in hours: what is written fits beside its axis."""
    axis = Axis.over([most * part], 0, 100, may_log=True)

    assert {len(axis.time_of(tick).split()[0]) for tick in axis.ticks()} <= {1, 2, 3, 4, 5}
    assert len({axis.time_of(tick) for tick in axis.ticks()}) == len(axis.ticks())


def test_a_logarithmic_axis_has_units_of_its_ticks() -> None:
    """From microseconds to seconds on one axis."""
    axis = Axis.over([0.0002, 5.0], 0, 100, may_log=True)

    told = [axis.time_of(tick) for tick in axis.ticks()]
    assert told == ["100 \u00b5s", "1 ms", "10 ms", "100 ms", "1 s", "10 s"]
