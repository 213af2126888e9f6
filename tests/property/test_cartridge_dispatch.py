"""Dispatch over any settings and requests: who names a cartridge gets that one, or is told."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.cartridges.dispatch.asked import EXTRA_BODY, PARAMS, Asked, of_body, of_extra_args
from kvkeep.cartridges.dispatch.catalogue import Catalogue, Known
from kvkeep.cartridges.dispatch.config import build_rule
from kvkeep.cartridges.dispatch.dispatcher import (
    Decision,
    Dispatcher,
    Unknown,
    UnknownCartridgeError,
)
from kvkeep.cartridges.dispatch.rules import Composite, Explicit, Static
from kvkeep.model.errors import InputError, KvkeepError, UnavailableError

NAMES = st.sampled_from("abc")
VALUES = st.one_of(st.none(), NAMES, st.text(max_size=3), st.integers(0, 3), st.booleans())
PLACES = st.dictionaries(st.sampled_from(["cartridge_id", "topic", "x"]), VALUES, max_size=3)
BODIES = st.fixed_dictionaries(
    {}, optional={PARAMS: PLACES, EXTRA_BODY: st.fixed_dictionaries({}, optional={PARAMS: PLACES})}
)
LEAVES = st.one_of(
    st.just({"type": "explicit"}),
    st.just({"type": "explicit", "key": "x"}),
    st.just({"type": "label", "label_key": "topic", "extras_key": "topic"}),
    NAMES.map(lambda name: {"type": "static", "cartridge_id": name}),
)
CONFIGS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(
        lambda routers: {"type": "composite", "routers": routers}
    ),
    max_leaves=5,
)
CATALOGUES = st.dictionaries(NAMES, NAMES, max_size=3).map(
    lambda topics: Catalogue(
        Known(cartridge_id=name, digest=name, labels={"topic": topic})
        for name, topic in topics.items()
    )
)


def decide(dispatcher: Dispatcher, asked: Asked, catalogue: Catalogue) -> Decision | KvkeepError:
    """The decision, or why there is none."""
    try:
        return dispatcher.decide(asked, catalogue)
    except (InputError, UnavailableError) as error:
        return error


@given(CONFIGS, BODIES, CATALOGUES, st.sampled_from(["refuse", "compute"]))
def test_a_decision_is_for_a_cartridge_that_is_there(
    config: dict[str, Any], body: dict[str, Any], catalogue: Catalogue, unknown: Unknown
) -> None:
    """Whatever is configured and asked: one of the catalogue, none with a reason, or a refusal."""
    dispatcher = Dispatcher(build_rule(config), unknown)
    decision = decide(dispatcher, of_body(body), catalogue)
    if isinstance(decision, KvkeepError):
        assert str(decision)
        assert "\n" not in str(decision)
        if unknown == "compute":
            assert not isinstance(decision, UnknownCartridgeError | UnavailableError)
        return
    if decision.cartridge is not None:
        assert catalogue.find(decision.cartridge.cartridge_id) is decision.cartridge
    assert decision.reason.isascii()
    assert decision.reason.isprintable()


@given(NAMES, NAMES, CATALOGUES)
def test_who_names_one_never_gets_another(named: str, default: str, catalogue: Catalogue) -> None:
    """With a default behind it, by name, and wherever the request says it."""
    dispatcher = Dispatcher(Composite((Explicit(), Static(default))))
    for request in (
        of_extra_args({PARAMS: {"cartridge_id": named}}),
        of_body({PARAMS: {"cartridge_id": named}}),
        of_body({EXTRA_BODY: {PARAMS: {"cartridge_id": named}}}),
    ):
        decision = decide(dispatcher, request, catalogue)
        if isinstance(decision, KvkeepError):
            assert isinstance(decision, UnknownCartridgeError)
            assert catalogue.find(named) is None
            assert repr(named) in str(decision)
        else:
            assert decision.cartridge is not None
            assert decision.cartridge.cartridge_id == named
