"""What a router can be told of cartridges."""

from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.router.settings import load_settings

ENGINES = ["http://127.0.0.1:1"]


def loaded(**cartridges: Any) -> Any:
    return load_settings(None, {}, {"engines": ENGINES, "cartridges": cartridges}).cartridges


def test_told_nothing_requests_name_ids() -> None:
    """And unknown ones are refused."""
    settings = loaded()

    assert settings.router == {"type": "explicit"}
    assert (settings.unknown, settings.resident_at) == ("refuse", "")


def test_without_the_section_cartridges_are_not_looked_for() -> None:
    """Requests pass as they are."""
    assert load_settings(None, {}, {"engines": ENGINES}).cartridges is None


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"router": {"type": "nonsense"}}, "unknown router type: nonsense"),
        ({"router": {"type": "static"}}, "static router requires"),
        ({"unknown": "ignore"}, "unknown"),
        ({"resident_at": "10.0.0.1:9400"}, "resident_at"),
        ({"resident_at": "http://{name}/status"}, "only {host} and {port}"),
        ({"refresh_s": 0}, "refresh_s"),
        ({"library": "a\0b"}, "zero byte"),
        ({"what": 1}, "what"),
    ],
)
def test_what_is_wrong_is_named(section: dict[str, Any], said: str) -> None:
    """One sentence, with the field."""
    with pytest.raises(InputError) as caught:
        loaded(**section)
    assert said in str(caught.value)


def test_a_hand_off_has_the_transfer_parameters_to_itself() -> None:
    """Both would write the same field of a request."""
    engines = [
        {"url": f"http://127.0.0.1:{port}", "role": role}
        for port, role in ((1, "prefill"), (2, "decode"))
    ]
    with pytest.raises(InputError, match="don't go together"):
        load_settings(None, {}, {"engines": engines, "handoff": {}, "cartridges": {}})
