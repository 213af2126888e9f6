"""Keys around a ring."""

from collections import Counter

from kvkeep.core.ring import Ring, spot_of

KEYS = [f"sequence-{number}".encode() for number in range(5000)]


def _ring(*names: str) -> Ring[str]:
    return Ring((name, 1.0, name) for name in names)


def _homes(ring: Ring[str]) -> list[str]:
    return [ring.home(spot_of(key)) for key in KEYS]


def test_homes_follow_from_names_alone() -> None:
    """The order in which members are named changes nothing."""
    assert _homes(_ring("a", "b", "c")) == _homes(_ring("c", "a", "b"))


def test_a_known_key_has_a_known_home() -> None:
    """What another version of this program wrote is still found: homes never change."""
    ring = _ring("127.0.0.1:7000", "127.0.0.1:7001", "127.0.0.1:7002")

    homes = [ring.home(spot_of(key))[-1] for key in KEYS[:16]]
    assert "".join(homes) == "2100002010021122"


def test_shares_are_even() -> None:
    """Of 5,000 keys no member has more than 1.25 of the mean."""
    for names in ("ab", "abc", "abcd", "abcdefgh"):
        shares = Counter(_homes(_ring(*names)))

        assert max(shares.values()) <= 1.25 * len(KEYS) / len(names)
        assert set(shares) == set(names)


def test_a_leaving_member_moves_only_its_keys() -> None:
    """All other keys stay where they are."""
    before, after = _homes(_ring("a", "b", "c")), _homes(_ring("a", "b"))

    assert [home for home in before if home != "c"] == [
        new for old, new in zip(before, after, strict=True) if old != "c"
    ]


def test_a_weight_is_a_share() -> None:
    """A member of twice the weight has about twice the keys."""
    ring = Ring([("a", 1.0, "a"), ("b", 2.0, "b")])
    shares = Counter(_homes(ring))

    assert 1.6 < shares["b"] / shares["a"] < 2.4


def test_a_walk_begins_at_home_and_meets_everyone_once() -> None:
    """Whatever the key."""
    ring = _ring("a", "b", "c", "d")

    for key in KEYS[:50]:
        walked = list(ring.walk(spot_of(key)))
        assert walked[0] == ring.home(spot_of(key))
        assert sorted(walked) == ["a", "b", "c", "d"]
