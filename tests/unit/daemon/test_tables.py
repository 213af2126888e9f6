"""The tables of docs/operations.md."""

from kvkeep.daemon.metrics import COUNTERS
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.tables import metrics_table, settings_table


def test_every_setting_is_explained() -> None:
    """One row each, with a meaning."""
    rows = settings_table().splitlines()[2:]

    assert len(rows) == len(DaemonSettings.__struct_fields__)
    assert all(len(row.split(" | ")[-1]) > 20 for row in rows)


def test_every_counter_is_explained() -> None:
    """Under the name that Prometheus shows."""
    table = metrics_table()
    rows = [f"| `kvkeep_{name}_total` | counter | {text} |" for name, text in COUNTERS.items()]

    assert all(row in table for row in rows)
