"""From settings to a tier."""

from pathlib import Path

import pytest

from kvkeep.daemon.movement.opening import judge_tiers, open_tier, own_settings
from kvkeep.daemon.tier_settings import (
    AnyTierSettings,
    DiskTierSettings,
    MooncakeTierSettings,
    ObjectStoreTierSettings,
    ValkeyTierSettings,
)
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError
from kvkeep.tiers.base import Gauges, Probes
from kvkeep.tiers.mooncake.settings import MooncakeSettings
from kvkeep.tiers.object_store import ObjectStoreSettings
from kvkeep.tiers.valkey import ValkeySettings
from kvkeep.tiers.wrappers.metered import MeteredTier
from tests.unit.daemon.movement.grounds import WAIT_S, keys

VALUE_BYTES = 10_000
CLOCK = SystemClock()


def disk(folder: Path, **changes: object) -> DiskTierSettings:
    """A small disk tier."""
    own: dict[str, object] = {"folder": str(folder), "capacity_bytes": 4 << 20}
    return DiskTierSettings(**(own | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"compress": True}])
def test_a_disk_is_opened_with_all_its_wrappers(tmp_path: Path, changes: dict[str, bool]) -> None:
    """It keeps values of the length that was said, and can tell what it has."""
    tier = open_tier(disk(tmp_path / "d", **changes), VALUE_BYTES, CLOCK)
    key = keys(0, 1)
    assert tier.queue.tier.write(key, [[memoryview(b"v" * VALUE_BYTES)]]) == [True]
    room = bytearray(VALUE_BYTES)

    assert tier.queue.tier.read(key, [[memoryview(room)]]) == [VALUE_BYTES]
    assert room == b"v" * VALUE_BYTES
    assert tier.is_local
    assert tier.has(key[0])
    assert isinstance(tier.queue.tier, MeteredTier)
    assert isinstance(tier.queue.tier, Probes)
    assert isinstance(tier.queue.tier, Gauges)
    assert tier.queue.close(WAIT_S) == []
    tier.queue.tier.close()


@pytest.mark.parametrize(("name", "expected"), [("", "disk"), ("fast", "fast")])
def test_a_tier_goes_by_its_name(tmp_path: Path, name: str, expected: str) -> None:
    """In figures and in what its queue says."""
    tier = open_tier(disk(tmp_path / "d", name=name), VALUE_BYTES, CLOCK)

    assert (tier.name, tier.queue.tier.name) == (expected, expected)
    tier.queue.close(WAIT_S)
    tier.queue.tier.close()


def test_a_tiers_own_settings_are_what_was_told() -> None:
    """Under the same names; what every kind can be told is not for the medium."""
    valkey = ValkeyTierSettings(url="valkey://h:1", prefix="p/", timeout_s=7, ca_file="c")
    own = own_settings(ValkeySettings, valkey)
    assert (own.url, own.prefix, own.timeout_s, own.ca_file) == ("valkey://h:1", "p/", 7, "c")
    store = ObjectStoreTierSettings(url="s3://b", region="r", allow_http=True, num_threads=33)
    other = own_settings(ObjectStoreSettings, store)
    assert (other.url, other.region, other.allow_http) == ("s3://b", "r", True)
    assert other.num_threads == ObjectStoreSettings(url="s3://b").num_threads
    mooncake = MooncakeTierSettings(master="h:1", segment_bytes=5, replica_num=2)
    third = own_settings(MooncakeSettings, mooncake, value_bytes_max=99)
    assert (third.segment_bytes, third.replica_num, third.value_bytes_max) == (5, 2, 99)


def test_a_queue_holds_a_few_values_whatever_is_said(tmp_path: Path) -> None:
    """Or blocks larger than the limit would never be moved."""
    tier = open_tier(disk(tmp_path / "d", queue_bytes_max=1 << 20), 1 << 20, CLOCK)

    assert tier.queue.limits.queue_bytes_max == 4 << 20
    tier.queue.close(WAIT_S)
    tier.queue.tier.close()


def test_a_wrong_key_file_leaves_nothing_behind(tmp_path: Path) -> None:
    """The folder can be opened right after."""
    missing = str(tmp_path / "no.key")
    with pytest.raises(InputError):
        open_tier(disk(tmp_path / "d", key_files=[missing]), VALUE_BYTES, CLOCK)
    tier = open_tier(disk(tmp_path / "d"), VALUE_BYTES, CLOCK)
    tier.queue.close(WAIT_S)
    tier.queue.tier.close()


def test_what_can_not_be_used_is_said(tmp_path: Path) -> None:
    """In one sentence that names the setting."""
    with pytest.raises(InputError, match="protocol"):
        open_tier(MooncakeTierSettings(master="127.0.0.1:1", protocol="x"), VALUE_BYTES, CLOCK)
    with pytest.raises(InputError):
        open_tier(ValkeyTierSettings(url="http://127.0.0.1"), VALUE_BYTES, CLOCK)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="folder"):
        open_tier(disk(tmp_path / "file"), VALUE_BYTES, CLOCK)


@pytest.fixture
def _s3_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)


@pytest.mark.usefixtures("_s3_keys")
@pytest.mark.parametrize(
    ("tier", "said"),
    [
        (
            ObjectStoreTierSettings(name="s3", url="s3://kv1", endpoint="http://10.0.0.1:80"),
            "the tier s3: 10.0.0.1 would get .* in clear: write https:// .* or set `allow_http`",
        ),
        (ObjectStoreTierSettings(url="kv"), "the tier object_store: .* `url` is s3://bucket"),
        (ValkeyTierSettings(url="http://h"), "the tier valkey: .*url"),
        (ValkeyTierSettings(url="valkey://h:1", prefix="*"), "prefix"),
        (ValkeyTierSettings(url="valkeys://h:1", ca_file="/dev/null/x"), "ca_file"),
        (MooncakeTierSettings(master="nowhere"), "write host:port"),
        (MooncakeTierSettings(master="h:1", protocol="x"), "choose tcp or rdma"),
        (ValkeyTierSettings(url="valkey://h:1", key_files=["/dev/null/x"]), "/dev/null/x"),
    ],
)
def test_what_needs_no_medium_is_judged_before_any_is_opened(
    tier: AnyTierSettings, said: str
) -> None:
    """One sentence that names the tier."""
    with pytest.raises(InputError, match=said) as caught:
        judge_tiers([tier])

    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_s3_keys")
def test_what_may_be_right_is_not_judged(tmp_path: Path) -> None:
    """Nobody is called, and no folder is made: a server may be down and a disk may be away."""
    judge_tiers(
        [
            disk(tmp_path / "d"),
            ValkeyTierSettings(url="valkey://127.0.0.1:1"),
            ObjectStoreTierSettings(url="s3://kv1", endpoint="http://127.0.0.1:1"),
            ObjectStoreTierSettings(url="s3://kv1", endpoint="http://h", allow_http=True),
            ObjectStoreTierSettings(url=f"file://{tmp_path}/s"),
            MooncakeTierSettings(master="127.0.0.1:1"),
        ]
    )

    assert list(tmp_path.iterdir()) == []
