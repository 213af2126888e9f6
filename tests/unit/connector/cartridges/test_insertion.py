"""The front-end: what a request becomes that names a cartridge, and what its client is told."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from kvkeep.cartridges.registry import Registry
from kvkeep.connector.cartridges import insertion
from kvkeep.connector.cartridges.insertion import install, prepare
from tests.unit.cartridges.made import contents, draft

IDS = [11, 12, 13, 14, 15, 16]
SHAPE = (8, 2, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A registry of a cartridge with ids and of one without."""
    with Registry(tmp_path / "library") as registry:
        registry.register_contents(draft("ships"), contents(token_ids=IDS))
        registry.register_contents(draft("trained", method="trained"), contents(shape=SHAPE))
    yield tmp_path / "library"
    insertion._desk_of(tmp_path / "library").close()
    insertion._desk_of.cache_clear()


def config(folder: Path, *, cartridges: bool = True, connector: str = "KvkeepConnector",
           **extra: Any) -> Any:  # fmt: skip
    """An engine's."""
    extra = {"socket": "/nowhere", "cartridge_library": str(folder), **extra}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector=connector,
            kv_connector_extra_config={**extra, "cartridges": cartridges},
        ),
        cache_config=SimpleNamespace(block_size=4),
    )


def params(cartridge_id: str | None = "ships", mode: str | None = None, **more: Any) -> Any:
    """Sampling parameters as the API makes them."""
    named = {"cartridge_id": cartridge_id} | ({"cartridge_mode": mode} if mode else {})
    return SamplingParams(extra_args={"kv_transfer_params": named, "own": 1}, **more)


def prompt(*ids: int) -> dict[str, Any]:
    """As vLLM has rendered it."""
    return {"type": "token", "prompt_token_ids": list(ids), "prompt": "text", "cache_salt": "s"}


def test_a_cartridge_is_put_in_front(folder: Path) -> None:
    """Its own ids, or placeholders; what the caller handed in is not changed."""
    given, asked = prompt(1, 2), params(mode="prepend")

    found, told = prepare(config(folder), given, asked)

    assert found == {**given, "prompt_token_ids": [*IDS, 1, 2]}
    assert given["prompt_token_ids"] == [1, 2]
    assert told.extra_args["kv_transfer_params"] == {
        "cartridge_id": "ships", "cartridge_mode": "prepend", "cartridge_tokens": 6,
    }  # fmt: skip
    assert told.extra_args["own"] == 1
    assert "cartridge_tokens" not in asked.extra_args["kv_transfer_params"]
    found, told = prepare(config(folder), prompt(1), params("trained"))
    assert found["prompt_token_ids"] == [0] * 8 + [1]


def test_a_router_may_have_put_it_there(folder: Path) -> None:
    """It is not put there twice."""
    first = prepare(config(folder), prompt(1, 2), params(mode="prepend"))

    assert prepare(config(folder), *first) == first


def test_text_stays_as_it_is(folder: Path) -> None:
    """A prompt that begins with the cartridge's."""
    given = (prompt(*IDS, 1), params())

    assert prepare(config(folder, cartridges=False), *given) == given


@pytest.mark.parametrize(
    ("given", "asked", "why"),
    [
        (prompt(1), params("planes"), "no cartridge 'planes'"),
        (prompt(1, 2), params(), "does not begin with cartridge ships: token 0 is 1"),
        (prompt(1), params("trained", "replace"), "knows no token ids"),
        (prompt(1), params(mode="append"), "names a cartridge wrongly"),
        (prompt(), params(mode="prepend"), "the prompt is empty"),
        (prompt(1), params(mode="prepend", prompt_logprobs=1), "logprobs"),
        ({"type": "embeds"}, params(mode="prepend"), "whole text only"),
        ("text", params(mode="prepend"), "whole text only"),
    ],
)
def test_what_can_not_be_served_is_refused(
    folder: Path, given: Any, asked: Any, why: str
) -> None:  # fmt: skip
    """With one sentence, which vLLM answers with status 400."""
    with pytest.raises(VLLMValidationError, match=why):
        prepare(config(folder), given, asked)


def test_an_adapter_is_refused(folder: Path) -> None:
    """A cartridge is KV of the model itself."""
    with pytest.raises(VLLMValidationError, match="LoRA"):
        prepare(config(folder), prompt(*IDS, 1), params(), object())


def test_an_engine_that_computes_prepends_nothing(folder: Path) -> None:
    """The sentence names the settings that are missing."""
    with pytest.raises(
        VLLMValidationError, match=r"cartridges: true .* kv_load_failure_policy fail"
    ):
        prepare(config(folder, cartridges=False), prompt(1), params(mode="prepend"))


def test_an_engine_without_cartridges_says_so() -> None:
    """Rather than answering without the document."""
    engine = config(Path(), cartridges=False, cartridge_library="")

    with pytest.raises(VLLMValidationError, match="serves no cartridges"):
        prepare(engine, prompt(1), params())


def test_another_connectors_requests_are_its_own(folder: Path) -> None:
    """Nothing is said about them, and nothing looked up."""
    given = (prompt(1), params("planes"))

    assert prepare(config(folder, connector="Other"), *given) == given


def test_vllm_is_wrapped_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Requests that name no cartridge pass as they are."""
    from vllm.v1.engine.input_processor import InputProcessor

    seen: list[tuple[Any, Any]] = []

    def process_inputs(self: Any, request_id: str, given: Any, asked: Any, *_: Any) -> None:
        seen.append((given, asked))

    monkeypatch.setattr(InputProcessor, "process_inputs", process_inputs)
    install()
    install()
    processor: Any = SimpleNamespace(vllm_config=config(folder))
    plain = SamplingParams()
    InputProcessor.process_inputs(processor, "r", prompt(1), plain, ())
    InputProcessor.process_inputs(processor, "r", prompt(1), params("trained"), ())

    assert seen[0] == (prompt(1), plain)
    assert seen[1][0]["prompt_token_ids"] == [0] * 8 + [1]
    original = getattr(InputProcessor.process_inputs, insertion._MARK)
    assert original is process_inputs
