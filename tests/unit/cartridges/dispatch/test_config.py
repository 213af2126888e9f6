"""Rules out of the settings that CartridgeConnector's users have."""

from typing import Any

import pytest

from kvkeep.cartridges.dispatch.asked import Asked
from kvkeep.cartridges.dispatch.catalogue import Catalogue, Known
from kvkeep.cartridges.dispatch.config import DEPTH_MAX, build_rule
from kvkeep.cartridges.dispatch.rules import ByHeader, ByLabel, Composite, Explicit, Static
from kvkeep.model.errors import InputError


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"type": "explicit"}, Explicit("cartridge_id")),
        ({"key": "cid"}, Explicit("cid")),
        ({"type": "explicit", "key": "cid"}, Explicit("cid")),
        ({"type": "header"}, ByHeader("x-kvkeep-cartridge")),
        ({"type": "header", "header": "X-Doc"}, ByHeader("x-doc")),
        ({"type": "label", "label_key": "topic"}, ByLabel("topic", "cartridge_label")),
        (
            {"type": "label", "label_key": "topic", "extras_key": "topic"},
            ByLabel("topic", "topic"),
        ),
        ({"type": "static", "cartridge_id": "s"}, Static("s")),
        (
            {"type": "composite", "routers": [{"type": "explicit"}, {"type": "static",
             "cartridge_id": "fb"}]},
            Composite((Explicit(), Static("fb"))),
        ),
    ],
)  # fmt: skip
def test_each_type_is_built(config: dict[str, Any], rule: object) -> None:
    """Settings say the rule, defaults applied."""
    assert build_rule(config) == rule


@pytest.mark.parametrize("config", [None, {}])
def test_without_settings_everything_gets_the_one_cartridge(config: dict[str, Any] | None) -> None:
    """Settings that name one cartridge and no router mean that one, for every request."""
    assert build_rule(config, default_id="d") == Static("d")


def test_a_static_router_falls_back_to_the_one_cartridge() -> None:
    """Its id may be left out where there is one only."""
    assert build_rule({"type": "static"}, default_id="fallback") == Static("fallback")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "router config is empty"),
        ({"type": "nonsense"}, "unknown router type: nonsense: choose from explicit, header"),
        ({"type": ["explicit"]}, "unknown router type"),
        ({"type": "static"}, "static router requires 'cartridge_id'"),
        ({"type": "static", "cartridge_id": ""}, "must be a text"),
        ({"type": "explicit", "key": 7}, "explicit router: 'key' must be a text"),
        ({"type": "label"}, "label router requires 'label_key'"),
        ({"type": "composite"}, "composite router requires 'routers'"),
        ({"type": "composite", "routers": []}, "composite router requires 'routers'"),
        ({"type": "composite", "routers": ["explicit"]}, "is described by a mapping"),
        ({"type": "explicit", "label_key": "x"}, "explicit router does not know label_key"),
        ({"type": "header", "header": "a b"}, "is no name of a header"),
        ({"type": "header", "header": "a:"}, "is no name of a header"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(config: dict[str, Any], said: str) -> None:
    """A config error names the router's type and the field."""
    with pytest.raises(InputError, match=said) as caught:
        build_rule(config)
    assert "\n" not in str(caught.value)


def test_a_label_router_needs_a_registry() -> None:
    """Cartridges that are named one by one have no labels to look up."""
    with pytest.raises(InputError, match="requires a CartridgeRegistry"):
        build_rule({"type": "label", "label_key": "patient_id"}, has_labels=False)


def test_a_default_reaches_into_a_composite() -> None:
    """The one cartridge is the default of a static router at any depth."""
    config = {"type": "composite", "routers": [{"type": "explicit"}, {"type": "static"}]}

    assert build_rule(config, default_id="d") == Composite((Explicit(), Static("d")))


def test_endless_nesting_is_refused() -> None:
    """Settings can't be deeper than a person would write them."""
    config: dict[str, Any] = {"type": "explicit"}
    for _ in range(DEPTH_MAX):
        config = {"type": "composite", "routers": [config]}

    with pytest.raises(InputError, match="nested"):
        build_rule(config)


def test_what_is_built_resolves() -> None:
    """From settings to an id: the label's cartridge, then the default."""
    rule = build_rule(
        {
            "type": "composite",
            "routers": [
                {"type": "label", "label_key": "patient_id", "extras_key": "patient_id"},
                {"type": "static", "cartridge_id": "fb"},
            ],
        }
    )
    catalogue = Catalogue([Known(cartridge_id="c_x", digest="d", labels={"patient_id": "X"})])

    assert rule.resolve(Asked(({"patient_id": "X"},)), catalogue).cartridge_id == "c_x"
    assert rule.resolve(Asked(()), catalogue).cartridge_id == "fb"
