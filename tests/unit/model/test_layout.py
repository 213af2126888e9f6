"""A layout and the namespace that follows from it."""

from dataclasses import fields, replace

import pytest

from kvkeep.model.errors import InputError
from kvkeep.model.layout import NUM_PAGES_MAX, PAGE_BYTES_MAX, KvLayout, derive_namespace
from kvkeep.model.tenant import TAG_BYTES, tag_of

LAYOUT = KvLayout(30, 3, 4096, 16, "bfloat16", "cpu-amx")
IDENTITY = {"weights": "abc", "rope": "10000"}


def test_sizes_follow_from_the_counts() -> None:
    """A block has a page per layer and head, and no byte between them."""
    assert LAYOUT.num_pages == 90
    assert LAYOUT.block_bytes == 90 * 4096


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "page_bytes", "block_tokens"])
def test_nothing_is_zero(name: str) -> None:
    """A layout with none of something is refused."""
    with pytest.raises(InputError, match=name):
        replace(LAYOUT, **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sizes",
    [{"num_layers": NUM_PAGES_MAX, "num_heads": 2}, {"page_bytes": PAGE_BYTES_MAX + 1}],
)
def test_nothing_is_huge(sizes: dict[str, int]) -> None:
    """A layout that no model has is refused, as a message may claim anything."""
    with pytest.raises(InputError, match="out of range"):
        replace(LAYOUT, **sizes)  # type: ignore[arg-type]


def test_a_difference_names_the_fields() -> None:
    """Two layouts that differ say in what; equal ones say nothing."""
    other = replace(LAYOUT, block_tokens=32, dtype="float16")

    assert LAYOUT.difference(LAYOUT) == ""
    assert LAYOUT.difference(other) == "block_tokens 16, not 32, dtype bfloat16, not float16"


def test_a_namespace_never_changes() -> None:
    """The namespace of known input is what it has always been."""
    assert (
        derive_namespace(LAYOUT, IDENTITY, "t").hex()
        == "44f26616115354673f16161a22eff4f6e590662f747f429e955e45a9ad4f570d"
    )


def test_the_order_of_an_identity_does_not_count() -> None:
    """An identity is a mapping, in whatever order it was filled."""
    backwards = dict(reversed(IDENTITY.items()))

    assert derive_namespace(LAYOUT, IDENTITY) == derive_namespace(LAYOUT, backwards)


@pytest.mark.parametrize("name", [field.name for field in fields(KvLayout)])
def test_every_field_of_a_layout_counts(name: str) -> None:
    """Blocks of layouts that differ in anything never meet."""
    old = getattr(LAYOUT, name)
    changed = old + 1 if isinstance(old, int) else old + "x"
    other = replace(LAYOUT, **{name: changed})  # type: ignore[arg-type]

    assert derive_namespace(LAYOUT, IDENTITY) != derive_namespace(other, IDENTITY)


@pytest.mark.parametrize("name", sorted(IDENTITY))
def test_every_part_of_an_identity_counts(name: str) -> None:
    """Another value, or none, is another namespace."""
    namespace = derive_namespace(LAYOUT, IDENTITY)
    without = {key: value for key, value in IDENTITY.items() if key != name}

    assert derive_namespace(LAYOUT, {**IDENTITY, name: IDENTITY[name] + "x"}) != namespace
    assert derive_namespace(LAYOUT, without) != namespace


def test_a_namespace_ends_with_its_tenants_tag() -> None:
    """By it a daemon finds the tenant's share of the pool; the rest differs as well."""
    mine, other = (derive_namespace(LAYOUT, IDENTITY, tenant) for tenant in ("mine", "other"))

    assert (mine[-TAG_BYTES:], other[-TAG_BYTES:]) == (tag_of("mine"), tag_of("other"))
    assert mine[:-TAG_BYTES] != other[:-TAG_BYTES]
