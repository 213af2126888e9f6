"""Reports of real runs against a fake engine, as they are written."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.arms import (
    Asking,
    Means,
    bisect,
    compare_arms,
    standard_arms,
    suspicious,
)
from kvkeep.validate.capability import probe
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import documents, load_words
from kvkeep.validate.report.form import FORM
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subject import Subject
from kvkeep.validate.suites.determinism import Determinism, make_plan

Written = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
def written(connect: Callable[..., Endpoint], no_pauses: None) -> Written:
    """Runs the determinism suite and the arms, and gives the report as JSON has it."""

    async def run(**faults: Any) -> dict[str, Any]:
        engine = connect(FakeEngine(store=FakeStore(), faults=Faults(**faults)))
        subject = Subject(engine, await probe(engine), engine)
        settings = CheckSettings(max_iterations=3)
        plan = make_plan(settings, load_words(), 60)
        suite = Determinism(subject, settings, plan, Sampling(8), exact=False, run_id="r")
        means, asking = Means(engine, engine), Asking(Sampling(8), 16, exact=False)
        arms = standard_arms(["cold", "cached", "reset"], means, run_id="s")
        prompts = [document.prompt() for document in documents(3, 60)]
        compared = await compare_arms(arms, prompts, Sampling(4), block_tokens=16, exact=True)
        judged = await suite.run()
        found = suspicious(judged.judged)
        judged.suspects = await bisect(found, means, asking, run_id="r", new_run_id=lambda: "t")
        runs = [judged.to_dict(), compared.to_dict()]
        passed = all(one["passed"] for one in runs)
        report: dict[str, Any] = json.loads(
            json.dumps({"schema": FORM, "passed": passed, "runs": runs})
        )
        return report

    return run
