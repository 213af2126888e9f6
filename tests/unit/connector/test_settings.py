"""What a user may write into kv_connector_extra_config."""

from typing import Any

import pytest

from kvkeep.connector.settings import ConnectorSettings, load_settings
from kvkeep.model.errors import InputError


def test_only_the_socket_must_be_given() -> None:
    """Everything else has a default under which KV is both stored and loaded."""
    found = load_settings({"socket": "/run/d.sock"})

    assert found == ConnectorSettings(socket="/run/d.sock")
    assert (found.store, found.load, found.cartridges, found.tenant) == (True, True, False, "")
    assert found.kv_form == "exact"


def test_numbers_may_come_as_text() -> None:
    """A command line gives text; it is read as the number it stands for."""
    found = load_settings({"socket": "s", "lease_s": "20", "store": "false"})

    assert (found.lease_s, found.store) == (20.0, False)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({}, "socket"),
        ({"socket": "s", "sockets": "t"}, "sockets"),
        ({"socket": 7}, "socket"),
        ({"socket": "s", "lease_s": 0.5}, "lease_s"),
        ({"socket": "s", "lookup_wait_ms": 51}, "lookup_wait_ms"),
        ({"socket": "s", "copy_threads": -1}, "copy_threads"),
        ({"socket": "s", "store_jobs_max": 0}, "store_jobs_max"),
        ({"socket": "s", "store": "perhaps"}, "store"),
        ({"socket": "s", "kv_form": "int4"}, "kv_form"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_is_wrong_is_named_in_one_sentence(extra: dict[str, Any], named: str) -> None:
    """A wrong, missing or unknown field stops the engine with its name and what to write."""
    with pytest.raises(InputError) as caught:
        load_settings(extra)

    text = str(caught.value)
    assert not set("\n`$") & set(text)
    assert text.startswith("kv_connector_extra_config is wrong: ")
    assert named in text.split("choose from ")[0]
    assert ("patience_ms" in text) == ("sockets" in extra)
