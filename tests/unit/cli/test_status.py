"""How a status looks to a person; asking a real daemon is in tests/integration."""

import io
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from kvkeep.cli.main import main
from kvkeep.cli.status import readable_bytes, show

STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "generation": 3,
    "pool": {
        "path": "/dev/shm/a.pool",
        "bytes": 2 << 30,
        "block_bytes": 737280,
        "layout": {"block_tokens": 32, "dtype": "bfloat16"},
    },
    "workers": 2,
    "gauges": {
        "slots": 2900.0,
        "slots_ready": 17.0,
        "read_leases": 1.0,
        "write_leases": 2.0,
        "uptime_s": 61.2,
    },
    "counters": {"blocks_stored": 12345, "blocks_evicted": 0},
}


def shown(status: dict[str, Any]) -> str:
    """What a person sees."""
    out = io.StringIO()
    show(status, Console(file=out, width=120))
    return out.getvalue()


def test_a_person_sees_what_is_held_and_what_was_done() -> None:
    """Sizes have units; counters that never moved are left out."""
    text = shown(STATUS)

    assert "17 ready of 2900, 720.0 KiB each, 32 tokens" in text
    assert "12,345" in text
    assert "blocks_evicted" not in text


def test_a_daemon_without_engines_says_so() -> None:
    """Before the first engine there is no layout, and that is not an error."""
    pool = STATUS["pool"] | {"layout": None, "block_bytes": 0}

    assert "no engine has come" in shown(STATUS | {"pool": pool})


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 << 40, "2.0 TiB")]
)
def test_sizes_are_readable(num_bytes: int, text: str) -> None:
    """The largest unit that leaves at least one."""
    assert readable_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--socket", "/nowhere/d.sock"], "start one with kvkeep daemon"),
        (["--socket", "a", "--url", "b"], "not both"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments: list[str], sentence: str) -> None:
    """Nobody there, or two places to ask."""
    done = CliRunner().invoke(main, ["status", *arguments])

    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
