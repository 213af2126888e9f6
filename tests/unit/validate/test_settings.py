"""Settings: flag before environment before stack file before profile, and every name works."""

from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.validate.settings import (
    ENVIRONMENT,
    REFERENCE_TEXT_URL,
    CheckSettings,
    is_set,
    resolve,
)

DOCUMENTED = {
    "KVBM_MODEL_ID": ("model_id", "some/model", "some/model"),
    "KVBM_SERVER_PORT": ("server_port", "8001", 8001),
    "KVBM_SERVER_START_TIMEOUT": ("server_start_timeout_s", "12.5", 12.5),
    "KVBM_CPU_BLOCKS": ("cpu_blocks", "12000", 12000),
    "KVBM_MAX_TOKENS": ("max_tokens", "48, 128,256", (48, 128, 256)),
    "KVBM_SEED": ("seed", "0", 0),
    "KVBM_MAX_ITERATIONS": ("max_iterations", "100", 100),
    "KVBM_WORD_COUNT": ("word_count", "150", 150),
    "KVBM_CONTROL_INTERVAL": ("control_interval", "5", 5),
    "KVBM_SHAKESPEARE_INTERVAL": ("shakespeare_interval", "2", 2),
    "KVBM_RANDOM_INTERVAL": ("random_interval", "3", 3),
    "KVBM_HTTP_TIMEOUT": ("http_timeout_s", "60", 60.0),
    "KVBM_SHAKESPEARE_URL": ("shakespeare_url", "file:///tmp/t.txt", "file:///tmp/t.txt"),
    "KVBM_CONCURRENT_REQUESTS": ("concurrent_requests", "10,25,50", (10, 25, 50)),
    "KVBM_IFEVAL_PROMPTS": ("ifeval_prompts", "50,120", (50, 120)),
}


@pytest.mark.parametrize("variable", sorted(DOCUMENTED))
def test_every_documented_variable_works(variable: str) -> None:
    """Each environment name of the suite sets its value."""
    name, raw, expected = DOCUMENTED[variable]

    assert getattr(resolve({}, {variable: raw}), name) == expected


def test_no_variable_is_undocumented() -> None:
    """The table above is complete."""
    assert set(ENVIRONMENT) == set(DOCUMENTED)


def test_unset_means_the_local_default() -> None:
    """Nothing named gives a short run of 48 tokens with seed 42 and the shipped text."""
    settings = resolve({}, {})

    assert settings == CheckSettings()
    assert (settings.max_tokens, settings.seed, settings.shakespeare_url) == ((48,), 42, None)


def test_the_reference_profile_has_the_documents_defaults() -> None:
    """The reference profile takes the suite's own defaults for everything nobody named."""
    settings = resolve({}, {}, profile="reference")

    assert settings.model_id == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert (settings.server_port, settings.cpu_blocks) == (8000, 10_000)
    assert (settings.max_iterations, settings.word_count, settings.http_timeout_s) == (500, 200, 30)
    assert settings.shakespeare_url == REFERENCE_TEXT_URL


def test_flag_beats_environment_beats_stack_file_beats_profile() -> None:
    """The nearest source decides each value by itself."""
    environ = {"KVBM_SEED": "2", "KVBM_MAX_ITERATIONS": "20"}
    stack: dict[str, Any] = {"seed": 3, "max_iterations": 30, "word_count": 300}

    settings = resolve({"seed": "1"}, environ, stack, "reference")

    assert (settings.seed, settings.max_iterations, settings.word_count) == (1, 20, 300)
    assert settings.cpu_blocks == 10_000


def test_an_empty_variable_counts_as_unset() -> None:
    """``KVBM_SEED=`` in a shell names nothing."""
    assert resolve({}, {"KVBM_SEED": " "}).seed == 42


def test_a_stack_file_may_give_lists() -> None:
    """A list in the stack file is a list, and one number is a list of one."""
    assert resolve({}, {}, {"max_tokens": [10, 48]}).max_tokens == (10, 48)
    assert resolve({}, {}, {"max_tokens": 10}).max_tokens == (10,)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"KVBM_SEED": "many"}, "KVBM_SEED"),
        ({"KVBM_SEED": "1,2"}, "KVBM_SEED"),
        ({"KVBM_MAX_TOKENS": ","}, "KVBM_MAX_TOKENS"),
        ({"KVBM_MAX_TOKENS": "48,0"}, "KVBM_MAX_TOKENS"),
        ({"KVBM_SERVER_PORT": "70000"}, "KVBM_SERVER_PORT"),
        ({"KVBM_MAX_ITERATIONS": "0"}, "KVBM_MAX_ITERATIONS"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(environ: dict[str, str], named: str) -> None:
    """A value that does not fit is refused, and the sentence says where it stands."""
    with pytest.raises(InputError, match=named):
        resolve({}, environ)


def test_a_bad_flag_is_named_as_it_was_typed() -> None:
    """A refused flag is named with its dashes."""
    with pytest.raises(InputError, match="--http-timeout"):
        resolve({"http_timeout_s": "soon"}, {})


def test_an_unknown_setting_of_a_stack_file_is_refused() -> None:
    """A misspelt name is refused instead of ignored, as is an unknown profile."""
    with pytest.raises(InputError, match="max_iteration'"):
        resolve({}, {}, {"max_iteration": 3})
    with pytest.raises(InputError, match="profile"):
        resolve({}, {}, profile="remote")


def test_it_is_known_what_a_person_named() -> None:
    """A flag or a variable names a value; a default does not."""
    assert is_set("word_count", {"word_count": "200"}, {})
    assert is_set("word_count", {}, {"KVBM_WORD_COUNT": "200"})
    assert not is_set("word_count", {"word_count": None}, {"KVBM_WORD_COUNT": ""})
