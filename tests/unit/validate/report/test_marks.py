"""Text stays text, whatever it says."""

from xml.etree import ElementTree

import pytest

from kvkeep.validate.report.marks import fill, legible, mark, text_of


def test_text_and_attributes_are_escaped() -> None:
    """No text of a report becomes an element or ends an attribute."""
    made = mark("p", "<script>&", title='"><script>')

    written = ElementTree.tostring(made, "unicode", method="html")

    assert written == '<p title="&quot;&gt;<script&gt;">&lt;script&gt;&amp;</p>'


def test_texts_stand_between_elements_in_order() -> None:
    """Children keep their order, and neighboring texts become one."""
    made = mark("p", "a", mark("b", "c"), "d", "e")

    assert ElementTree.tostring(made, "unicode") == "<p>a<b>c</b>de</p>"
    assert ElementTree.tostring(fill(mark("p"), ["x", "y"]), "unicode") == "<p>xy</p>"


@pytest.mark.parametrize("bad", ["\x00", "\x1b", "\x08", "\ud800", "\ufffe"])
def test_what_a_document_cannot_hold_is_replaced(bad: str) -> None:
    """A control character or half a surrogate pair would make the file unreadable."""
    assert legible(f"a{bad}b") == "a\ufffdb"
    assert legible("ä\t\n𝄞") == "ä\t\n𝄞"


def test_names_of_attributes() -> None:
    """Underscores become dashes, and what is None is left out."""
    assert mark("g", class_="a", stroke_width=2, x=None).attrib == {
        "class": "a",
        "stroke-width": "2",
    }


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (0.012345, "0.0123"), (1234.5, "1,234"), (12, "12")]
)
def test_numbers_are_short(number: float, text: str) -> None:
    """Three digits count."""
    assert text_of(number) == text
