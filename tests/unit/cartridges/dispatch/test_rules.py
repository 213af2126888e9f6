"""Each rule by itself, and in order."""

import pytest

from kvkeep.cartridges.dispatch.asked import Asked
from kvkeep.cartridges.dispatch.catalogue import Catalogue, Known
from kvkeep.cartridges.dispatch.rules import (
    ByHeader,
    ByLabel,
    Composite,
    Explicit,
    Rule,
    Static,
    headers_of,
    shown,
)
from kvkeep.model.errors import InputError


def asked(**said: object) -> Asked:
    return Asked((said,))


def known(cartridge_id: str, registered_s: float = 0.0, **labels: str) -> Known:
    return Known(cartridge_id=cartridge_id, digest="d", labels=labels, registered_s=registered_s)


def found(rule: Rule, request: Asked, *cartridges: Known) -> str | None:
    return rule.resolve(request, Catalogue(cartridges)).cartridge_id


def test_explicit_says_what_the_request_says() -> None:
    """The id is the request's; the reason names the key only."""
    resolution = Explicit().resolve(asked(cartridge_id="a"), Catalogue())

    assert (resolution.cartridge_id, resolution.reason) == ("a", "by cartridge_id")
    assert resolution.is_asked


def test_explicit_without_an_id_has_none() -> None:
    """A request that names nothing asked for nothing."""
    resolution = Explicit().resolve(asked(), Catalogue())

    assert (resolution.cartridge_id, resolution.missing) == (None, "")
    assert resolution.reason == "no cartridge_id"


def test_explicit_reads_another_key() -> None:
    """With a key of its own it reads only that."""
    assert found(Explicit("cart"), asked(cart="a")) == "a"
    assert found(Explicit("cart"), asked(cartridge_id="b")) is None


def test_a_header_says_the_id() -> None:
    """A header names the cartridge, and a request without it gets none by this rule."""
    rule = ByHeader()

    assert found(rule, Asked((), {"x-kvkeep-cartridge": "a"}.get)) == "a"
    assert found(rule, asked(cartridge_id="b")) is None


def test_an_empty_header_is_refused() -> None:
    """An empty name is a mistake of whoever set it."""
    with pytest.raises(InputError, match="header x-kvkeep-cartridge is empty"):
        found(ByHeader(), Asked((), {"x-kvkeep-cartridge": ""}.get))


def test_static_says_always_the_same() -> None:
    """Whatever a request says."""
    assert found(Static("d"), asked()) == "d"
    assert found(Static("d"), asked(cartridge_id="ignored")) == "d"
    assert not Static("d").resolve(asked(), Catalogue()).is_asked


def test_a_label_is_looked_up() -> None:
    """Of several the one that was registered first, whatever their ids."""
    cartridges = (known("a", 2.0, patient_id="P001"), known("b", 1.0, patient_id="P001"))

    rule = ByLabel("patient_id", "patient_id")
    assert found(rule, asked(patient_id="P001"), *cartridges) == "b"


def test_a_label_s_value_may_stand_in_the_transfer_parameters() -> None:
    """Where the id may stand, the value may."""
    request = Asked(({}, {"doc_type": "medical"}))

    assert found(ByLabel("doc_type", "doc_type"), request, known("m", doc_type="medical")) == "m"


def test_a_label_is_not_mixed_up_with_another() -> None:
    """The value of one label is not looked for in another."""
    assert found(ByLabel("a", "a"), asked(a="v"), known("x", b="v")) is None


def test_a_label_that_nothing_has_is_missing() -> None:
    """The request named something: it is not as if it had asked for nothing."""
    resolution = ByLabel("patient_id", "patient_id").resolve(asked(patient_id="P9"), Catalogue())

    assert resolution.cartridge_id is None
    assert resolution.missing == "the label patient_id=P9"
    assert "P9" not in resolution.reason


def test_a_request_without_the_label_s_key_names_nothing() -> None:
    """It is computed as any other."""
    resolution = ByLabel("patient_id").resolve(asked(), Catalogue([known("a", patient_id="x")]))

    assert (resolution.cartridge_id, resolution.missing) == (None, "")


def test_the_first_of_several_that_has_one_wins() -> None:
    """A default stands last and is reached only by requests that name nothing."""
    rule = Composite((Explicit(), Static("fallback")))

    assert found(rule, asked(cartridge_id="picked")) == "picked"
    assert found(rule, asked()) == "fallback"


def test_their_order_counts() -> None:
    """What is behind a default is never reached."""
    assert found(Composite((Static("1"), Static("2"))), asked()) == "1"
    assert found(Composite((Static("2"), Static("1"))), asked()) == "2"


def test_if_none_has_one_all_say_why() -> None:
    """The reasons are told in their order, and what was missing is kept."""
    rule = Composite((Explicit(), ByLabel("topic", "topic"), Explicit("other")))
    resolution = rule.resolve(asked(topic="t"), Catalogue())

    assert resolution.cartridge_id is None
    assert resolution.reason == "no cartridge_id, nothing has that topic, no other"
    assert resolution.missing == "the label topic=t"


def test_what_is_shown_of_a_request_fits_one_line() -> None:
    """Line ends, escapes and letters of other scripts don't get into answers and logs."""
    assert shown("a\r\nX-Evil: 1\x1b") == "a??X-Evil: 1?"
    assert shown("é") == "?"
    assert len(shown("x" * 500)) == 83


def test_the_headers_that_count_are_known() -> None:
    """Of rules inside rules too, in their order."""
    rule = Composite((Explicit(), ByHeader("a"), Composite((ByHeader("b"), Static("c")))))

    assert headers_of(rule) == ["a", "b"]
