"""Settings, stack files, key files, prefixes and names: whatever they hold, one sentence."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.connector.settings import load_settings as load_connector_settings
from kvkeep.daemon.settings import DaemonSettings, load_settings
from kvkeep.model.errors import InputError
from kvkeep.model.settings.sources import FILE_BYTES_MAX
from kvkeep.stack.precedence import load_spec
from kvkeep.tiers.entry_names import checked_prefix, entry_name, parse_entry_name
from kvkeep.tiers.wrappers.key_ring import KEY_BYTES, read_key_file
from tests.property.fuzz.damage import costing_at_most, damaged, examples

GOOD = b"""
pool_bytes: 2GiB
socket: /run/kvkeep.sock
metrics_port: 9000
lease_s_max: 60.0
eviction: s3fifo
quotas: {a: 0.5, b: 0.25}
tiers:
  - {kind: disk, folder: /nvme, capacity_bytes: 2TiB}
  - {kind: valkey, url: "valkey://h:1/0", key_files: [k], write_bytes_per_s: 0x10}
"""
STACK = b"""
model: smollm2
engines: {count: 2, max_model_len: 1024}
daemon: {pool_bytes: 64MiB, tiers: [{kind: disk, folder: d, capacity_bytes: 1GiB}]}
"""
SENTENCE_CHARS_MAX = 4000
NAMES = st.sampled_from([*DaemonSettings.__struct_fields__, "kind", "folder", "url", "<<", "x"])
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.binary(max_size=9)
    | st.text(max_size=20) | st.sampled_from(["2GiB", ".nan", "1e999", "disk", "s3fifo"])
)  # fmt: skip
PLAIN: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def outcome(load: Any, argument: Any) -> tuple[Any, str]:
    """What a loader gives, or the sentence with which it refuses."""
    try:
        return load(argument), ""
    except InputError as error:
        return None, str(error)


def load_text(text: bytes, load: Any) -> object:
    """What a file of these bytes gives; None where it is refused in one short line."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "file.yaml"
        file.write_bytes(text)
        found, sentence = outcome(load, file)
    assert "\n" not in sentence
    assert len(sentence) < SENTENCE_CHARS_MAX
    return found


def load_daemon(file: Path) -> object:
    """As the daemon loads its file."""
    return load_settings(file, {}, {})


def load_stack(file: Path) -> object:
    """As `kvkeep up` loads a stack."""
    return load_spec(file, environment={})


LOADERS = [(load_daemon, GOOD), (load_stack, STACK)]
LAUGHS = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)
)
HOSTILE = {
    "a thousand million laughs": LAUGHS + b"pool_bytes: *a11\nmodel: *a11\n",
    "laughs in a known field": LAUGHS + b"tiers: *a11\nengines: *a11\n",
    "laughs as a known field": b"tiers: " + b"&x [" * 5 + b"1" + b"]" * 5 + b"\n" + LAUGHS,
    "a list in itself": b"tiers: &a [*a]\nengines: *a\n",
    "a mapping in itself": b"quotas: &a {b: *a}\nmodel: *a\n",
    "deep lists": b"tiers: " + b"[" * 4_000,
    "deep closed lists": b"tiers: " + b"[" * 2_000 + b"]" * 2_000,
    "deep mappings": b"".join(b" " * n + b"a:\n" for n in range(1200)),
    "a number of a million digits": b"pool_bytes: 0x" + b"f" * 900_000,
    "a decimal of a million digits": b"metrics_port: " + b"9" * 900_000,
    "binary digits": b"sessions_max: 0b" + b"1" * 100_000,
    "sexagesimal": b"metrics_port: 1" + b":59" * 5_000,
    "an impossible date": b"socket: 2001-99-99",
    "a date": b"socket: 2001-01-01",
    "a set": b"socket: !!set {a, b}",
    "a key that is a list": b"? [a, b]\n: c",
    "a key that is a mapping": b"? {a: b}\n: c",
    "a tag of python": b"socket: !!python/object/apply:os.getcwd []",
    "not UTF-8": b"socket: \xff\xfe",
    "UTF-16": "socket: x".encode("utf-16"),
    "zero bytes": b"socket: \0",
    "two documents": b"a: 1\n---\nb: 2",
    "merge of nothing": b"<<: 1",
    "merge of itself": b"a: &a {<<: *a}",
    "infinity as a size": b"pool_bytes: .inf",
    "a tier that is text": b"tiers: text",
    "tiers that are texts": b"tiers: [text, 1, null]",
    "a long name": b"x" * 500_000 + b": 1",
    "a long text": b"planner: " + b"x" * 500_000,
}


@pytest.mark.parametrize("load", [load_daemon, load_stack])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_costs_little(name: str, load: Any) -> None:
    """What expands, nests or claims to be huge takes no more memory than a file may."""
    assert len(HOSTILE[name]) <= FILE_BYTES_MAX
    with costing_at_most(64 * FILE_BYTES_MAX):
        assert load_text(HOSTILE[name], load) is None or name == "UTF-16"


@pytest.mark.parametrize(("load", "good"), LOADERS)
@given(data=st.data())
@examples(30)
def test_a_damaged_file_is_settings_or_one_sentence(
    load: Any, good: bytes, data: st.DataObject
) -> None:
    """Bytes cut, changed and put in: what comes of it is checked, or refused."""
    load_text(data.draw(damaged(good)), load)


@pytest.mark.parametrize("load", [load_daemon, load_stack])
@given(values=st.dictionaries(NAMES, PLAIN, max_size=5))
@examples(30)
def test_any_values_are_settings_or_one_sentence(load: Any, values: dict[str, Any]) -> None:
    """Of whatever type, under names that are known and that are not."""
    load_text(yaml.safe_dump(values).encode(), load)


@given(values=st.dictionaries(NAMES | st.just("tenant_key_file"), PLAIN, max_size=5))
@examples(100)
def test_any_connector_settings_are_settings_or_one_sentence(values: dict[str, Any]) -> None:
    """What an engine is given on its command line."""
    _, sentence = outcome(load_connector_settings, values | {"socket": "s"})

    assert "\n" not in sentence


KEYS = (
    st.binary(max_size=200)
    | st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
    | st.text("0123456789abcdefABCDEF\r\n ", min_size=60, max_size=70).map(str.encode)
)


@given(KEYS)
@examples(200)
def test_a_key_file_is_a_key_or_one_sentence(content: bytes) -> None:
    """Nothing of what it holds is shown."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "key"
        file.touch(0o600)
        file.write_bytes(content)
        found, sentence = outcome(read_key_file, file)
        shown = content.decode("latin-1").strip()

        assert len(shown) < 8 or shown not in sentence.replace(str(file), "")
        if found is not None:
            assert len(found) == KEY_BYTES
            assert found == content or found.hex() == content.decode().strip().lower()


def test_a_huge_key_file_is_not_read(tmp_path: Path) -> None:
    """Its first bytes are enough to refuse it."""
    file = tmp_path / "key"
    file.touch(0o600)
    os.truncate(file, 1 << 40)

    with costing_at_most(1 << 20), pytest.raises(InputError):
        read_key_file(file)


@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda data: data.decode("latin-1")))
@examples(300)
def test_any_name_is_a_key_or_nothing(text: str) -> None:
    """A name on a server is exactly what a key is called, or somebody else's."""
    name = f"kvkeep/{text}"
    found = parse_entry_name(name, "kvkeep/")

    assert found is None or entry_name(found, "kvkeep/") == name
    prefix, sentence = outcome(checked_prefix, text)
    assert "\n" not in sentence
    assert prefix in (None, text)


@given(st.data())
@examples(200)
def test_a_damaged_name_is_a_key_or_nothing(data: st.DataObject) -> None:
    """Near to a real one too."""
    good = f"kvkeep/{'ab' * 32}/{'09' * 32}/65535"
    name = data.draw(damaged(good.encode())).decode("latin-1")
    found = parse_entry_name(name, "kvkeep/")

    assert found is None or entry_name(found, "kvkeep/") == name
