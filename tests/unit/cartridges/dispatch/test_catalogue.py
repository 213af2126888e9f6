"""What is read of a registry for dispatch."""

from pathlib import Path

from kvkeep.cartridges.dispatch.catalogue import Catalogue, Known, read_catalogue
from kvkeep.cartridges.registry import Registry
from tests.unit.cartridges.made import contents, draft


def test_a_registry_s_cartridges_are_known_by_id_and_label(tmp_path: Path) -> None:
    """Each with the digest by which its KV is told from any other."""
    with Registry(tmp_path) as registry:
        entry = registry.register_contents(draft("ships", labels={"topic": "sea"}), contents())
        catalogue = read_catalogue(registry)

    known = catalogue.find("ships")
    assert known is not None
    assert (known.digest, known.model) == (entry.digest, "tiny")
    assert catalogue.labelled("topic", "sea") == (known,)
    assert len(catalogue) == 1


def test_the_one_registered_first_is_meant(tmp_path: Path) -> None:
    """By time, not by id."""
    times = iter([2.0, 1.0])
    with Registry(tmp_path, wall_s=lambda: next(times)) as registry:
        for name in ("a", "b"):
            registry.register_contents(draft(name, labels={"topic": "sea"}), contents())
        catalogue = read_catalogue(registry)

    assert [known.cartridge_id for known in catalogue.labelled("topic", "sea")] == ["b", "a"]


def test_a_cartridge_whose_file_is_gone_is_not_there(tmp_path: Path) -> None:
    """It could not be served."""
    with Registry(tmp_path) as registry:
        registry.register_contents(draft("ships"), contents()).path.unlink()

        assert read_catalogue(registry).find("ships") is None


def test_of_two_with_one_id_the_later_counts() -> None:
    """Lists that people write may say one twice."""
    first, second = (Known(cartridge_id="a", digest=digest) for digest in "12")

    assert Catalogue([first, second]).find("a") is second
