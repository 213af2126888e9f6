"""Settings: flag before environment before stack file before profile, and every name works."""

from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.validate.settings import (
    ENVIRONMENT,
    REFERENCE_TEXT_URL,
    CheckSettings,
    Document,
    names_set,
    resolve,
    variables_of,
)
from tests.unit.validate import reference_tables as tables

TABLES = {
    Document.DETERMINISM: tables.DETERMINISM,
    Document.MULTI_PROCESS: tables.MULTI_PROCESS,
    Document.HAND_OFF: tables.HAND_OFF,
}
ROWS = [
    pytest.param(document, variable, id=variable.name)
    for document, variables in TABLES.items()
    for variable in variables
]


@pytest.mark.parametrize(("document", "variable"), ROWS)
def test_every_documented_variable_changes_its_value(
    document: Document, variable: tables.Variable
) -> None:
    """Each environment name of the documents sets what it should, and nothing else."""
    before = resolve({}, {}, documents=(document,)).to_dict()
    after = resolve({}, {variable.name: variable.raw}, documents=(document,)).to_dict()

    changed = {name: value for name, value in after.items() if value != before[name]}
    if variable.name == "KVBM_MAX_TOKENS":
        assert changed.pop("concurrent_max_tokens") == variable.changed
    assert changed in ({variable.field: variable.changed}, {})
    assert after[variable.field] == variable.changed


@pytest.mark.parametrize(("document", "variable"), ROWS)
def test_the_reference_profile_has_the_documents_default(
    document: Document, variable: tables.Variable
) -> None:
    """Where the document names a default, the reference profile takes it."""
    value = getattr(resolve({}, {}, profile="reference", documents=(document,)), variable.field)
    if variable.default in tables.UNSAID:
        assert value in (None, False)
    else:
        (shown,) = value if isinstance(value, tuple) else (value,)
        assert str(shown).removesuffix(".0") == variable.default


def test_no_variable_is_undocumented() -> None:
    """The tables are complete, and each suite hears its own document only."""
    for document, variables in TABLES.items():
        assert set(variables_of(document)) == {variable.name for variable in variables}
    assert set(ENVIRONMENT) == {row.name for rows in TABLES.values() for row in rows}


def test_a_suite_hears_its_own_document_only() -> None:
    """A name as common as MODEL says nothing to a suite whose document does not have it."""
    environ = {"MODEL": "other/model", "LIMIT": "5", "KVBM_SEED": "7"}

    settings = resolve({}, environ, documents=(Document.DETERMINISM,))

    assert (settings.model_id, settings.limit, settings.seed) == (None, 60, 7)


def test_two_names_of_one_value_must_agree() -> None:
    """Where several documents are heard and name one value differently, none is guessed."""
    with pytest.raises(InputError, match="MODEL"):
        resolve({}, {"MODEL": "a/b", "KVBM_MODEL_ID": "c/d"})
    assert resolve({}, {"MODEL": "a/b", "KVBM_MODEL_ID": "a/b"}).model_id == "a/b"


def test_the_scale_decides_sizes_that_nobody_named() -> None:
    """Small sizes on few cores, the documents' on a GPU host; a named size stays."""
    small, full = resolve({}, {}), resolve({}, {}, scale="full")
    named = resolve({"limit": "7"}, {}, scale="full")

    assert (small.scale, small.limit, small.num_concurrent, small.num_documents) == (
        "small", 60, 8, 8,
    )  # fmt: skip
    assert (full.scale, full.limit, full.num_concurrent, full.num_documents) == (
        "full", 300, 50, 30,
    )  # fmt: skip
    assert (named.limit, named.num_prompts) == (7, 50)
    assert resolve({"scale": "small"}, {}, scale="full").limit == 60
    with pytest.raises(InputError, match="scale"):
        resolve({"scale": "huge"}, {})


def test_answer_lengths_hold_for_both_suites_where_named() -> None:
    """Unset means 48 in sequence and 10 at once; set, it holds for both."""
    unset, named = resolve({}, {}), resolve({}, {"KVBM_MAX_TOKENS": "5,6"})

    assert (unset.max_tokens, unset.concurrent_max_tokens) == ((48,), (10,))
    assert (named.max_tokens, named.concurrent_max_tokens) == ((5, 6), (5, 6))


def test_limits_in_seconds_hold_for_their_model_only() -> None:
    """Another model than the document's is held to relative limits, unless a person names one."""
    documents = (Document.MULTI_PROCESS,)
    other = {"MODEL": "some/model"}

    assert resolve({}, {}, profile="reference", documents=documents).max_ttft_s == 0.22
    assert resolve({}, other, profile="reference", documents=documents).max_ttft_s is None
    assert resolve({"max_ttft_s": "3"}, other, documents=documents).max_ttft_s == 3.0


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
    """A flag, a variable or the stack file names a value; a default does not."""
    assert names_set({"word_count": "200"}, {}) == {"word_count"}
    assert names_set({}, {"KVBM_WORD_COUNT": "200"}, {"seed": 1}) == {"word_count", "seed"}
    assert not names_set({"word_count": None, "max_tokens": ()}, {"KVBM_WORD_COUNT": ""})
    assert not names_set({}, {"LIMIT": "5"}, documents=(Document.DETERMINISM,))
