"""Builds HTML and SVG as trees of elements, so that no text can become markup.

Whatever a model or a server said is text of a node or value of an attribute, and is escaped when
the tree is written; nothing here joins strings into markup.
"""

import re
from collections.abc import Iterable
from xml.etree import ElementTree

Element = ElementTree.Element
Child = Element | str

_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 can't hold, surrogates and control characters: a parser stops at them."""


def legible(text: object) -> str:
    """The text with a mark in place of each character that a document can't hold."""
    return _ILLEGAL.sub("\ufffd", str(text))


def mark(tag: str, *children: Child, **attributes: object) -> Element:
    """Make an element.

    Args:
        tag: Of a constant, never of a report.
        children: Elements and texts in their order.
        attributes: A trailing underscore is taken off, others become dashes: ``class_``,
            ``stroke_width``. None leaves one out.
    """
    named = {
        name.rstrip("_").replace("_", "-"): legible(value)
        for name, value in attributes.items()
        if value is not None
    }
    return fill(ElementTree.Element(tag, named), children)


def fill(element: Element, children: Iterable[Child]) -> Element:
    """Append elements and texts; returns the element."""
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + legible(child)
        else:
            element.text = (element.text or "") + legible(child)
    return element


def text_of(number: float, unit: str = "") -> str:
    """A number with three digits that count: ``0.0123``, ``1.23``, ``12,300``."""
    if number == 0:
        return f"0{unit}"
    if abs(number) >= 1000:
        return f"{number:,.0f}{unit}"
    return f"{number:.3g}{unit}"
