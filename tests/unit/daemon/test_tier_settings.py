"""What a daemon can be told about its tiers."""

import itertools
import json
from pathlib import Path

import pytest

from kvkeep.daemon.settings import DaemonSettings, load_settings
from kvkeep.daemon.tier_settings import (
    DiskTierSettings,
    MooncakeTierSettings,
    ObjectStoreTierSettings,
    ValkeyTierSettings,
    with_names,
    with_sizes,
)
from kvkeep.model.errors import InputError

_numbers = itertools.count()


def loaded(folder: Path, *tiers: object) -> list[object]:
    """The tiers of a settings file."""
    file = folder / "daemon.yaml"
    file.write_text(json.dumps({"tiers": list(tiers)}))
    return list(load_settings(file, {}, {}).tiers)


def test_each_kind_is_understood(tmp_path: Path) -> None:
    """In their order, with sizes as people write them."""
    disk, valkey, store, mooncake = loaded(
        tmp_path,
        {"kind": "disk", "folder": "~/kv", "capacity_bytes": "2TiB", "queue_bytes_max": "64MiB"},
        {"kind": "valkey", "url": "valkey://127.0.0.1:6379/0", "write_bytes_per_s": "10 MB"},
        {"kind": "object_store", "url": "s3://kv1"},
        {"kind": "mooncake", "master": "127.0.0.1:50051", "segment_bytes": "1GiB"},
    )
    assert isinstance(disk, DiskTierSettings)
    assert (disk.capacity_bytes, disk.queue_bytes_max) == (2 << 40, 64 << 20)
    assert isinstance(valkey, ValkeyTierSettings)
    assert valkey.write_bytes_per_s == 10_000_000
    assert isinstance(store, ObjectStoreTierSettings)
    assert store.deadline_s > store.timeout_s
    assert isinstance(mooncake, MooncakeTierSettings)
    assert mooncake.segment_bytes == 1 << 30


@pytest.mark.parametrize(
    ("tier", "said"),
    [
        ({"kind": "disk", "folder": "x"}, "capacity_bytes"),
        ({"kind": "disk", "folder": "x", "capacity_bytes": "1 apple"}, "not a size"),
        ({"kind": "disk", "folder": "x", "capacity_bytes": 5}, "1048576"),
        ({"kind": "tape"}, "tape"),
        ({"kind": "valkey", "url": "u", "colour": "red"}, "colour"),
        ({"kind": "valkey", "url": "u", "num_threads": 0}, "num_threads"),
        ({"kind": "mooncake", "master": "m", "probation_share": 1.5}, "probation_share"),
        ({}, "kind"),
        ("disk", "write a mapping"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, tier: object, said: str) -> None:
    """One sentence with the field or the value in it."""
    with pytest.raises(InputError, match=said):
        loaded(tmp_path, tier)


def test_only_sizes_are_converted() -> None:
    """A folder that is called like a size stays a folder."""
    tier = {"folder": "2GiB", "capacity_bytes": "2GiB"}
    assert with_sizes(tier) == {"folder": "2GiB", "capacity_bytes": 2 << 30}
    assert with_sizes("no mapping") == "no mapping"


def disk(name: str = "") -> dict[str, object]:
    """A tier as people write it."""
    folder = f"x{next(_numbers)}"
    return {"kind": "disk", "folder": folder, "capacity_bytes": "1GiB", "name": name}


def test_each_tier_has_a_name_of_its_own(tmp_path: Path) -> None:
    """The one that was given, or its kind with the first number that is free."""
    file = tmp_path / "daemon.yaml"
    valkey = {"kind": "valkey", "url": "valkey://h"}
    tiers = [disk("disk-2"), disk(), disk(), valkey, disk("disk-4"), disk()]
    file.write_text(json.dumps({"tiers": tiers}))
    settings = load_settings(file, {}, {})

    names = [tier.name for tier in settings.named_tiers]
    assert names == ["disk-2", "disk", "disk-3", "valkey", "disk-4", "disk-5"]
    assert DaemonSettings().named_tiers == with_names([]) == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("fast", "fast"), "2 tiers have the name 'fast': give each a name of its own"),
        (("pool",), "a tier's name can't be 'pool'"),
        (("Fast one",), "write small letters, digits"),
        (("x" * 65,), "at most 64"),
    ],
)
def test_a_name_that_can_not_be_is_refused(
    tmp_path: Path, names: tuple[str, ...], said: str
) -> None:
    """One sentence with the mend."""
    with pytest.raises(InputError, match=said):
        loaded(tmp_path, *(disk(name) for name in names))


@pytest.mark.parametrize(
    "spelling",
    ["{home}/kv", "{home}/kv/", "{home}/./kv", "{home}/other/../kv", "{home}/link", "~/kv"],
)
@pytest.mark.parametrize("is_there", [True, False])
def test_two_disks_in_one_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str, is_there: bool
) -> None:
    """However it is spelled, and whether or not it has been made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("kv")
    if is_there:
        (tmp_path / "kv").mkdir()
    folders = [f"{tmp_path}/kv", spelling.format(home=tmp_path)]

    with pytest.raises(InputError, match=r"'disk' and 'disk-2' .* a folder of its own") as caught:
        loaded(tmp_path, *(disk() | {"folder": folder} for folder in folders))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tier",
    [
        {"kind": "valkey", "url": "valkey://user:hunter2@h:1"},
        {"kind": "object_store", "url": "s3://kv1", "endpoint": "https://h"},
        {"kind": "mooncake", "master": "h:1"},
    ],
)
def test_two_tiers_in_one_place_on_a_server_are_refused(
    tmp_path: Path, tier: dict[str, object]
) -> None:
    """With other prefixes they are two places."""
    with pytest.raises(InputError, match="leave one out, or give each a prefix") as caught:
        loaded(tmp_path, tier, tier | {"name": "second"})

    assert "hunter2" not in str(caught.value)
    assert len(loaded(tmp_path, tier, tier | {"prefix": "another/"})) == 2


def valkey(url: str) -> dict[str, object]:
    """An entry of this kind."""
    return {"kind": "valkey", "url": url}


def store(url: str, endpoint: str = "") -> dict[str, object]:
    """An entry of this kind."""
    return {"kind": "object_store", "url": url, "endpoint": endpoint}


def mooncake(master: str) -> dict[str, object]:
    """An entry of this kind."""
    return {"kind": "mooncake", "master": master}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((valkey("valkey://h"), valkey(f"valkey://h{more}")) for more in ("/", "/0", ":6379")),
        *((valkey("valkey://h"), valkey(url)) for url in ("redis://h", "valkey://:pw@h")),
        (valkey("valkey://h"), valkey("valkeys://H.:6379")),
        (valkey("valkey://localhost:1"), valkey("valkey://127.0.0.1:1")),
        (valkey("valkey://[::1]:1"), valkey("valkey://127.1:1")),
        (valkey("unix:///run/v"), valkey("unix:///run/./v")),
        (store("s3://kv1", "http://localhost:1"), store("s3://kv1", "http://127.0.0.1:1/")),
        (store("s3://kv1", "https://h"), store("s3://kv1", "https://H:443")),
        (mooncake("localhost:1"), mooncake("127.0.0.1:1")),
        (mooncake("[::1]:1"), mooncake("127.0.0.1:1")),
    ],
)
def test_one_place_on_a_server_has_many_spellings(
    tmp_path: Path, one: object, other: object
) -> None:
    """All of them are understood, and the second tier refused."""
    with pytest.raises(InputError, match="leave one out, or give each a prefix"):
        loaded(tmp_path, one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (valkey("valkey://h"), valkey("valkey://h/1")),
        (valkey("valkey://h"), valkey("valkey://h:1")),
        (valkey("valkey://h"), valkey("valkey://h2")),
        (store("s3://kv1", "http://localhost:1"), store("s3://kv2", "http://localhost:1")),
        (store("s3://kv1", "http://localhost:1"), store("s3://kv1", "http://localhost:2")),
        (store("s3://kv1"), store("s3://kv1", "http://localhost:2")),
        (store("file:///nowhere/a"), store("file:///nowhere/a/b")),
        (mooncake("h:1"), mooncake("h:2")),
    ],
)
def test_two_places_are_not_refused(tmp_path: Path, one: object, other: object) -> None:
    """Where they differ in what a server tells apart."""
    assert len(loaded(tmp_path, one, other)) == 2


@pytest.mark.parametrize("spelling", ["{home}/kv/", "{home}/./kv", "{home}/link"])
def test_one_folder_of_two_object_stores_is_refused(tmp_path: Path, spelling: str) -> None:
    """With another prefix they are two places; an ``endpoint`` means nothing there."""
    (tmp_path / "link").symlink_to("kv")
    url = "file://" + spelling.format(home=tmp_path)
    tiers = [store(f"file://{tmp_path}/kv"), store(url, "http://127.0.0.1:1")]

    with pytest.raises(InputError, match="give each a prefix"):
        loaded(tmp_path, *tiers)
    assert len(loaded(tmp_path, tiers[0], tiers[1] | {"prefix": "another/"})) == 2


def test_a_folder_of_a_disk_is_no_object_stores(tmp_path: Path) -> None:
    """Whatever the prefix: the disk takes all of it."""
    tiers = [disk() | {"folder": f"{tmp_path}/kv"}, store(f"file://{tmp_path}/kv")]
    for each in (tiers, tiers[::-1]):
        with pytest.raises(InputError, match="give each a folder of its own"):
            loaded(tmp_path, *each)


@pytest.mark.parametrize(
    ("tier", "said"),
    [
        *(
            (disk() | {"folder": folder}, "the tier disk: folder can't be")
            for folder in ("", "~-/x")
        ),
        (disk() | {"folder": "a" * 256}, "255 in each name"),
        (store("file:///" + "a" * 256), "255 in each name"),
        (store("s3://kv1", "http://[::1"), "`endpoint` can't be so"),
        (store("file:///kv", "http://[::1"), "`endpoint` can't be so"),
        (store("s3://kv1", "http://127.0.0.1:99999"), "its port is none"),
        (store("kv1"), "the tier object_store: .*s3://bucket"),
        *(
            (valkey(url), "the tier valkey: .*mend `url`")
            for url in (
                "valkey://a..b:1",
                "valkey://ho st:1",
                "valkey://h:0",
                "valkey://h/2147483648",
            )
        ),
        (valkey(f"valkey://{'a' * 70}"), "its host is no name"),
        (valkey("valkey://h") | {"prefix": "*"}, "prefix"),
        *((mooncake(master), "write host:port") for master in ("h:1:2", "a b:1", "h:99999")),
    ],
)
def test_a_place_that_can_not_be_is_refused(tmp_path: Path, tier: object, said: str) -> None:
    """In one sentence, before anything is opened."""
    with pytest.raises(InputError, match=said) as caught:
        loaded(tmp_path, tier)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tier",
    [
        disk() | {"folder": "a\0b"},
        valkey("valkeys://h") | {"ca_file": "a\0b"},
        valkey("valkey://h") | {"key_files": ["a", "a\0b"]},
        store("file:///a\0b"),
    ],
)
def test_a_zero_byte_is_refused(tmp_path: Path, tier: object) -> None:
    """Before the system is asked for such a path."""
    with pytest.raises(InputError, match="holds a zero byte"):
        loaded(tmp_path, tier)
