"""Fleets come one after the other, and whatever happens to one is its own outcome."""

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.spec import StackSpec
from kvkeep.validate.started import Started
from kvkeep.validate.subject import Addresses
from kvkeep.validate.suite import fleets as module
from kvkeep.validate.suite.base import Fleet, NotApplicable, Report
from kvkeep.validate.suite.fleets import run_on_fleets


def fleet(name: str) -> Fleet:
    spec = make_spec({"name": name, "engines": [{"name": "a"}]}, environment={})
    return Fleet("TP 1", name, spec)


class Machine:
    """Starts nothing, and notes what would be up when."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.fails: dict[str, Exception] = {}

    @contextlib.contextmanager
    def started(self, spec: StackSpec, *, quiet: bool) -> Iterator[Started]:
        if spec.name in self.fails:
            raise self.fails[spec.name]
        self.said.append(f"{spec.name} up")
        try:
            yield Started(Addresses(spec.name), None)
        finally:
            self.said.append(f"{spec.name} down")

    def check(self, fleet: Fleet, ready: Started) -> Sequence[Report]:
        self.said.append(f"{ready.addresses.engine} checked")
        return [NotApplicable("x", fleet.decode)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(module, "started_anew", machine.started)
    return machine


def outcomes(machine: Machine, *names: str) -> dict[str, tuple[str, str]]:
    """Outcome and reason by fleet."""
    ran = run_on_fleets("x", [fleet(name) for name in names], machine.check)
    found = [(each.fleet.decode, each.reports[0].to_dict()) for each in ran]
    return {name: (report["outcome"], report["reason"]) for name, report in found}


def test_each_is_down_before_the_next_and_before_it_is_told(machine: Machine) -> None:
    """So that two never share the machine, and an interruption at a report leaves nothing."""
    for ran in run_on_fleets("x", [fleet("one"), fleet("two")], machine.check):
        machine.said.append(f"{ran.fleet.decode} told")

    assert machine.said == [
        *("one up", "one checked", "one down", "one told"),
        *("two up", "two checked", "two down", "two told"),
    ]


def test_a_refusal_is_told_apart_from_a_start_that_failed(machine: Machine) -> None:
    """The one said by name why it can't be; the other should have come up. Others go on."""
    machine.fails = {"odd": InputError("9 heads."), "late": UnavailableError("No answer.")}

    assert outcomes(machine, "odd", "late", "good") == {
        "odd": ("refused", "9 heads."),
        "late": ("failed", "No answer."),
        "good": ("not-applicable", "good"),
    }


@pytest.mark.parametrize("error", [InputError("It serves no model."), UnavailableError("Gone.")])
def test_a_fleet_that_is_up_and_cannot_be_asked_has_failed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever kind of error that is: nobody refused it. It is stopped all the same."""

    def check(fleet: Fleet, ready: Started) -> Sequence[Report]:
        raise error

    monkeypatch.setattr(machine, "check", check)

    assert outcomes(machine, "one") == {"one": ("failed", str(error))}
    assert machine.said == ["one up", "one down"]


def test_an_interruption_stops_what_runs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And starts nothing more."""

    def check(fleet: Fleet, ready: Started) -> Sequence[Report]:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "check", check)

    with pytest.raises(KeyboardInterrupt):
        outcomes(machine, "one", "two")
    assert machine.said == ["one up", "one down"]
