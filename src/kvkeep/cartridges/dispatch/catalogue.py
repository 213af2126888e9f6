"""The cartridges that requests may name, as they were at one moment."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it needs far more than whoever only looks cartridges up
    from kvkeep.cartridges.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What dispatch has to know of a cartridge."""

    cartridge_id: str
    digest: str
    """Of its manifest: no other cartridge has it (``Head.digest``)."""
    model: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    registered_s: float = 0.0
    """Of several with one label, the one that has been there for longest is meant."""


class Catalogue:
    """Cartridges by id and by label; never changes."""

    def __init__(self, known: Iterable[Known] = ()) -> None:
        """Take them; of two with one id the later one counts."""
        self._by_id = {each.cartridge_id: each for each in known}
        self._by_label: dict[tuple[str, str], list[Known]] = {}
        in_order = sorted(self._by_id.values(), key=lambda it: (it.registered_s, it.cartridge_id))
        for each in in_order:
            for label in each.labels.items():
                self._by_label.setdefault(label, []).append(each)

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, cartridge_id: str) -> Known | None:
        """The cartridge of an id."""
        return self._by_id.get(cartridge_id)

    def labelled(self, name: str, value: str) -> tuple[Known, ...]:
        """Cartridges whose label of that name has that value, longest registered first."""
        return tuple(self._by_label.get((name, value), ()))


def read_catalogue(registry: "Registry") -> Catalogue:
    """What a registry holds now; cartridges whose file is gone are not among them.

    Raises:
        UnavailableError: The registry is busy, or closed.
        CorruptDataError: It is damaged.
    """
    return Catalogue(
        Known(
            cartridge_id=entry.cartridge_id,
            digest=entry.digest,
            model=entry.manifest.model,
            labels=entry.manifest.labels,
            registered_s=entry.registered_s,
        )
        for entry in registry.list_entries()
        if entry.has_file
    )
