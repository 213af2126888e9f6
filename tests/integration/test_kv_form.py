"""Engines that store KV in different forms, beside each other and after each other."""

from pathlib import Path

import platformdirs
import pytest

from kvkeep.model.errors import RefusedError
from kvkeep.transfer.int8_form import Int8Form
from tests.integration.daemons import running_daemon
from tests.integration.simulated_engines import (
    Rank,
    answer_to,
    make_cache_config,
    make_config,
    simulated_engine,
    write_model,
)

PROMPT = [(position * 7919) % 1000 for position in range(64)]
INT8 = {"kv_form": "int8"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder, and a user cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    return write_model(tmp_path / "model")


def test_an_engine_in_eight_bits_beside_an_exact_one_is_refused(model: Path) -> None:
    """A pool has one form: the second engine does not start and is told why; the first goes on."""
    with running_daemon() as daemon:
        exact = make_config(model, daemon.socket)
        int8 = make_config(model, daemon.socket, extra=INT8)
        with simulated_engine(exact) as engine:
            engine.add("before", PROMPT)
            engine.run()
            with pytest.raises(
                RefusedError, match=f"page_format .*{Int8Form.name}, not .*of its own"
            ):
                Rank(int8, make_cache_config(1, 64), 0)
            assert engine.reset_local()
            engine.add("after", PROMPT)
            engine.run()

            assert engine.answers["after"] == answer_to(PROMPT, 4)
            assert engine.num_loaded_tokens == 48


def test_an_exact_engine_beside_one_in_eight_bits_is_refused(model: Path) -> None:
    """The other way round too: nobody stores exact blocks in a pool that says otherwise."""
    with running_daemon() as daemon:
        config = make_cache_config(1, 64)
        first = Rank(make_config(model, daemon.socket, extra=INT8), config, 0)
        with pytest.raises(RefusedError, match=rf"page_format .*, not .*{Int8Form.name}"):
            Rank(make_config(model, daemon.socket), config, 0)
        first.connector.shutdown()
