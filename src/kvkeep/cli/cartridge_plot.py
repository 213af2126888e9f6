"""The losses of a training as one SVG that needs nothing but itself."""

from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

from kvkeep.validate.report import charts
from kvkeep.validate.report.marks import Element, mark
from kvkeep.validate.report.whole_file import write_whole

TITLE_HEIGHT, LINE_HEIGHT = 26, 16
KEY = 9
MEAN_STEPS = 10


def write_plot(cartridge_id: str, record: Any, path: Path) -> None:
    """Write the plot; an old one is replaced at once.

    Raises:
        InputError: The place can't be written. What was there stays.
    """
    write_whole(ElementTree.tostring(plot(cartridge_id, record), "unicode") + "\n", path)


def plot(cartridge_id: str, record: Any) -> Element:
    """Losses by step, of what was trained on and of what was held out.

    Args:
        cartridge_id: For its title.
        record: ``kvkeep.authoring.training.record.Record``.
    """
    starts = range(0, len(record.steps), MEAN_STEPS)
    runs = [record.steps[start : start + MEAN_STEPS] for start in starts]
    series = {
        f"trained on, the mean of {MEAN_STEPS} steps": [
            (fmean(each.step for each in run), fmean(each.trained_on for each in run))
            for run in runs
        ],
        "held out": [
            (float(each.step), each.held_out) for each in record.steps if each.held_out is not None
        ],
    }
    title = f"{cartridge_id}: distance to the whole text, nats per token"
    picture = charts.curves(title, series, "step")
    top = TITLE_HEIGHT + LINE_HEIGHT * len(series)
    width, height = charts.WIDTH, charts.HEIGHT + top
    style = files("kvkeep.validate.report").joinpath("style.css").read_text("utf-8")
    root = mark("svg", viewBox=f"0 0 {width} {height}", width=width * 2, height=height * 2)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.append(mark("style", style + "text { font: 12px system-ui, sans-serif; }"))
    root.append(mark("rect", width=width, height=height, style="fill: var(--ground)"))
    root.append(mark("text", title, x=8, y=TITLE_HEIGHT - 10, class_="name"))
    for number, name in enumerate(series):
        base = TITLE_HEIGHT + LINE_HEIGHT * number
        place = {"x": charts.LEFT, "y": base, "width": KEY, "height": KEY}
        root.append(mark("rect", class_=f"bar s{number}", **place))
        root.append(mark("text", name, x=charts.LEFT + KEY + 5, y=base + KEY, class_="name"))
    for name, value in {"y": top, "width": width, "height": charts.HEIGHT}.items():
        picture.set(name, str(value))
    # Sizes of a page would scale it inside the picture.
    picture.set("class", "")
    root.append(picture)
    return root
