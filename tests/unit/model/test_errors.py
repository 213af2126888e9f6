"""Every error kvkeep raises on purpose can be caught as one, and as what to do about it."""

import pytest

from kvkeep.model import errors

KINDS = [
    errors.InputError,
    errors.RefusedError,
    errors.UnavailableError,
    errors.CorruptDataError,
    errors.CapacityError,
    errors.InvariantError,
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_no_other_kind(kind: type[errors.KvkeepError]) -> None:
    """The six kinds ask for different things, so none is caught as another."""
    others = [other for other in KINDS if other is not kind]

    assert issubclass(kind, errors.KvkeepError)
    assert not issubclass(kind, tuple(others))
