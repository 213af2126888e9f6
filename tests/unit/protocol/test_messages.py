"""The set of messages as a whole."""

from dataclasses import fields
from typing import get_args

from kvkeep.model.ids import HASH_BYTES
from kvkeep.model.layout import KvLayout
from kvkeep.protocol import messages as m
from kvkeep.protocol.frames import FRAME_BYTES_MAX

KINDS = [*get_args(m.ToDaemon), *get_args(m.ToClient)]


def test_every_tag_is_used_once() -> None:
    """Messages to the daemon have tags below 100, messages to a client above, each its own."""
    tags = [kind.__struct_config__.tag for kind in KINDS]

    assert len(set(tags)) == len(tags)
    assert all(kind.__struct_config__.tag < 100 for kind in get_args(m.ToDaemon))
    assert all(kind.__struct_config__.tag > 100 for kind in get_args(m.ToClient))


def test_every_message_is_in_a_union() -> None:
    """A message that neither side accepts would be of no use."""
    defined = [
        kind
        for kind in vars(m).values()
        if isinstance(kind, type) and issubclass(kind, m.Message) and kind is not m.Message
    ]

    assert sorted(kind.__name__ for kind in defined) == sorted(kind.__name__ for kind in KINDS)


def test_a_layout_on_the_wire_has_the_fields_of_a_layout() -> None:
    """The wire's Layout and the model's say the same in the same order."""
    assert m.Layout.__struct_fields__ == tuple(field.name for field in fields(KvLayout))


def test_the_largest_lists_fit_a_frame() -> None:
    """A message with as many hashes as it may carry is within the limit of a frame."""
    assert m.HASHES_MAX * (HASH_BYTES + 4) + 4 * m.TEXT_MAX < FRAME_BYTES_MAX
