"""Result files: where the reference document has them."""

from pathlib import Path

from kvkeep.validate.settings import CheckSettings, Document, resolve
from kvkeep.validate.suite.results import results_folder


def test_the_folder_is_the_documents() -> None:
    """Under the reference profile the folder carries the build's id, as the document says."""
    settings = resolve(
        {}, {"BUILD_ID": "b7"}, profile="reference", documents=(Document.MULTI_PROCESS,)
    )

    assert results_folder(settings) == Path("/tmp/lmcache_ci_results_b7")


def test_a_named_folder_is_taken() -> None:
    """RESULTS_DIR wins; without a build's id the time stands for it."""
    assert results_folder(CheckSettings(results_dir="/tmp/x")) == Path("/tmp/x")
    assert "kvkeep_check_results_local_" in str(results_folder(CheckSettings()))
