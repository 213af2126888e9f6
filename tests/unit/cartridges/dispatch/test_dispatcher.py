"""From rules to cartridges that are there, and to the sentences of those that are not."""

import pytest

from kvkeep.cartridges.dispatch.asked import Asked
from kvkeep.cartridges.dispatch.catalogue import Catalogue, Known
from kvkeep.cartridges.dispatch.dispatcher import Dispatcher, UnknownCartridgeError
from kvkeep.cartridges.dispatch.rules import ByLabel, Composite, Explicit, Rule, Static
from kvkeep.model.errors import InputError, UnavailableError

SHIPS = Known(cartridge_id="ships", digest="d1", labels={"topic": "sea"})
CATALOGUE = Catalogue([SHIPS])


def asked(**said: object) -> Asked:
    return Asked((said,))


def test_a_named_cartridge_that_is_there_is_decided_for() -> None:
    """With what is known of it, and by which word it was named."""
    decision = Dispatcher(Explicit()).decide(asked(cartridge_id="ships"), CATALOGUE)

    assert (decision.cartridge, decision.reason) == (SHIPS, "by cartridge_id")


def test_a_request_that_names_nothing_is_computed() -> None:
    """Cartridges are for who asks for them."""
    decision = Dispatcher(Explicit()).decide(asked(), CATALOGUE)

    assert (decision.cartridge, decision.reason) == (None, "no cartridge_id")
    assert not decision.is_missing


def test_an_unknown_id_is_refused_by_name() -> None:
    """One sentence: which, and where to look."""
    with pytest.raises(UnknownCartridgeError) as caught:
        Dispatcher(Explicit()).decide(asked(cartridge_id="whales"), CATALOGUE)

    assert str(caught.value) == (
        "there is no cartridge 'whales': see kvkeep cartridge ls, and register it"
    )


def test_an_unknown_id_does_not_get_the_default() -> None:
    """A request that names a cartridge gets that one or none: never another's answers."""
    dispatcher = Dispatcher(Composite((Explicit(), Static("ships"))))

    with pytest.raises(UnknownCartridgeError):
        dispatcher.decide(asked(cartridge_id="whales"), CATALOGUE)


def test_an_unknown_label_is_refused_by_name() -> None:
    """As an unknown id is."""
    with pytest.raises(UnknownCartridgeError, match="no cartridge has the label topic=sky"):
        Dispatcher(ByLabel("topic", "topic")).decide(asked(topic="sky"), CATALOGUE)


@pytest.mark.parametrize(
    ("rule", "request_", "reason"),
    [
        (Explicit(), asked(cartridge_id="whales"), "unknown by cartridge_id"),
        (ByLabel("topic", "topic"), asked(topic="sky"), "nothing has that topic"),
        (Static("whales"), asked(), "unknown by default"),
    ],
)
def test_where_that_is_wanted_the_unknown_is_computed(
    rule: Rule, request_: Asked, reason: str
) -> None:
    """Fall-through has to be configured, and is told of; the request's own words are not."""
    decision = Dispatcher(rule, unknown="compute").decide(request_, CATALOGUE)

    assert (decision.cartridge, decision.reason) == (None, reason)
    assert decision.is_missing


def test_a_default_that_is_not_there_is_not_the_client_s_fault() -> None:
    """It is unavailable, by name, until somebody registers it."""
    with pytest.raises(UnavailableError, match="'whales', is not there: register it"):
        Dispatcher(Static("whales")).decide(asked(), CATALOGUE)


def test_an_id_that_can_t_be_one_is_just_unknown() -> None:
    """What no cartridge could be called is shown without what would break a line."""
    with pytest.raises(UnknownCartridgeError) as caught:
        Dispatcher(Explicit()).decide(asked(cartridge_id="../a\r\nb"), CATALOGUE)

    assert "'../a??b'" in str(caught.value)


def test_a_value_that_is_no_name_is_refused_also_where_the_unknown_is_computed() -> None:
    """Whoever writes a list for an id made a mistake."""
    with pytest.raises(InputError, match="cartridge_id must be one text"):
        Dispatcher(Explicit(), unknown="compute").decide(asked(cartridge_id=[1]), CATALOGUE)
