"""Entries of etcd as members."""

import logging

import pytest

from kvkeep.router.membership.etcd import EtcdView
from kvkeep.router.membership.etcd_client import Entry

A = Entry("/p/a", b'{"url": "http://a:1"}')
B = Entry("/p/b", b'{"url": "http://b:1", "role": "decode", "name": "a"}')


def names(view: EtcdView) -> list[str]:
    return [member.title for member in view.members]


def test_a_key_is_the_name() -> None:
    """An entry that claims another name does not get it."""
    view = EtcdView("/p/")
    view.resync([B, A], 0.0, keep_s=0.0)

    assert names(view) == ["a", "b"]


def test_entries_come_and_go() -> None:
    """In the order in which they changed."""
    view = EtcdView("/p/")
    view.change([A, B, Entry("/p/a", None)])

    assert names(view) == ["b"]


def test_what_is_missing_has_left() -> None:
    """Reading all anew says who is not there any more."""
    view = EtcdView("/p/")
    view.resync([A, B], 0.0, keep_s=0.0)
    view.resync([B], 1.0, keep_s=0.0)

    assert names(view) == ["b"]


def test_after_an_outage_what_is_missing_stays_for_a_while() -> None:
    """Its lease may have ended because etcd was away; who comes back is no guest."""
    view = EtcdView("/p/")
    view.resync([A, B], 0.0, keep_s=0.0)
    view.resync([], 100.0, keep_s=10.0)
    view.change([B])
    assert (names(view), view.num_kept) == (["a", "b"], 1)
    view.resync([B], 109.9, keep_s=10.0)
    assert names(view) == ["a", "b"]
    view.resync([B], 110.0, keep_s=10.0)

    assert (names(view), view.num_kept) == (["b"], 0)


def test_one_that_is_kept_may_be_deleted() -> None:
    """A deletion that is seen means what it says."""
    view = EtcdView("/p/")
    view.resync([A], 0.0, keep_s=0.0)
    view.resync([], 100.0, keep_s=10.0)
    view.change([Entry("/p/a", None)])

    assert (names(view), view.num_kept) == ([], 0)


@pytest.mark.parametrize(
    "value",
    [b"", b"{}", b"[]", b"\xff", b"{", b'{"url": "ftp://a"}', b'{"url":' * 3000, b"1" * 9999],
)
def test_a_value_that_is_no_engine_changes_nothing(
    value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The last good one of that key stays, and the others are not touched."""
    view = EtcdView("/p/")
    view.change([A])
    with caplog.at_level(logging.WARNING):
        view.change([Entry("/p/a", value), B])

    assert (names(view), view.num_bad, len(caplog.records)) == (["a", "b"], 1, 1)
    assert len(caplog.records[0].getMessage()) < 500
