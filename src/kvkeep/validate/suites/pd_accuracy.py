"""Accuracy of a hand-off: through the router every answer is that of a single engine.

Prompts shorter than a block and many blocks long, chat and completions, whole and streamed. A
decode engine that computes prompts itself answers right, too: so its counters have to show that
the prompts came from elsewhere.
"""

from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import servable_of_one
from kvkeep.validate.load import Endpoint
from kvkeep.validate.runner import Watch, run_phase
from kvkeep.validate.settings import Document
from kvkeep.validate.suite.asking import FORMS, Form, ask
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.needs import PAIR
from kvkeep.validate.suite.replay import Replay
from kvkeep.validate.suite.sizes import make_cutter

NAME = "pd-accuracy"
HANDED_SHARE_MIN = 0.8
LONG_TOKENS = (200, 600, 1500)
PER_LENGTH = 2
ATTEMPTS = 2
"""Two tokens that tie may fall either way once, even where nothing is wrong."""
MAX_TOKENS = 24


async def run(context: Context) -> list[SuiteReport]:
    """One report."""
    report = context.new_report(NAME, "router against one engine", MAX_TOKENS)
    await compare(context, report)
    return [report]


async def compare(context: Context, report: SuiteReport, *, is_uneven: bool = False) -> None:
    """Fill a report about the pair behind a router.

    Args:
        context: Whose subject has a router and both kinds of engines.
        report: New.
        is_uneven: Prefill engines are made otherwise than decode engines, so that both computing a
            prompt themselves give answers a little apart: this is noise, too.
    """
    subject = context.subject
    assert subject.front is not None
    prompts = await _make_prompts(context, report)
    watch = Watch(subject.engine, subject.daemon, front=subject.front)
    replay = Replay(report, prompts, progress=context.progress, watch=watch)
    single = Watch(subject.baseline or subject.engine)
    first = await replay.phase("one engine", prompts, cold=True, watch=single)
    second = await replay.phase("one engine again", prompts, cold=True, watch=single)
    others = [second]
    if is_uneven:
        prefill = Watch(subject.prefill[0])
        others.append(await replay.phase("a prefill engine", prompts, cold=True, watch=prefill))
    replay.note_noise(first, *others)
    before = await watch.read_settled()
    routed = await run_phase(
        "through the router",
        watch,
        prompts,
        report.sampling,
        salt_of=lambda i, _: f"{report.run_id}-routed-{i}",
        progress=context.progress,
    )
    report.phases.append(routed)
    replay.judge_usable(first, *others)
    for i, reference in enumerate(first.answers):
        report.judged.append(replay.judged(routed, i, reference))
    handed = (await watch.read_settled()).since(before).external_hit_tokens
    _check_handed(report, handed, routed.answers)
    _check_usage(report, first.answers, routed.answers)
    await _check_forms(report, subject.front, prompts)
    await _check_echo(report, subject.front, prompts[0])
    await _check_front(report, subject.front)


async def _make_prompts(context: Context, report: SuiteReport) -> list[Prompt]:
    cutter = await make_cutter(context)
    seed = context.settings.seed
    made = [
        Prompt(f"short-{i + 1}", text, "short") for i, text in enumerate(("Hi.", "Name a color."))
    ]
    for num_tokens in LONG_TOKENS:
        fitted = cutter.fit(report, f"prompt_tokens_{num_tokens}", num_tokens)
        documents = cutter.documents(PER_LENGTH, fitted, seed + num_tokens)
        for document in documents:
            prompt = document.prompt()
            name = f"{num_tokens}-tokens-{prompt.prompt_id}"
            made.append(Prompt(name, prompt.text, prompt.kind, prompt.secrets))
    return made


def _check_handed(report: SuiteReport, handed: int, answers: tuple[Answer, ...]) -> None:
    """What the decode engine did not compute came from the prefill engine."""
    block_tokens = report.subject.capabilities.block_tokens
    if len(report.subject.decode) > 1 or block_tokens is None:
        report.check("prompts are handed over", None, "not to be told of this fleet", gate=True)
        return
    could = sum(servable_of_one(answer.prompt_tokens or 0, block_tokens) for answer in answers)
    report.numbers |= {"handed_tokens": handed, "servable_tokens": could}
    report.check(
        "prompts are handed over",
        handed >= HANDED_SHARE_MIN * could > 0,
        f"{handed} of {could} tokens of whole blocks came to the decode engine from outside; "
        f"{HANDED_SHARE_MIN:.0%} needed",
        gate=True,
    )


def _check_usage(
    report: SuiteReport, single: tuple[Answer, ...], routed: tuple[Answer, ...]
) -> None:
    """Usage is that of the client's prompt, not of the prefill leg."""
    wrong = [
        (ours.prompt_tokens, theirs.prompt_tokens)
        for ours, theirs in zip(single, routed, strict=True)
        if ours.prompt_tokens != theirs.prompt_tokens
    ]
    report.check(
        "usage counts the prompt", not wrong, f"{wrong}" if wrong else "as one engine does"
    )


async def _check_forms(report: SuiteReport, front: Endpoint, prompts: list[Prompt]) -> None:
    """Each form is whole, and streamed and whole forms agree."""
    defects: list[str] = []
    unequal: list[str] = []
    for prompt in (prompts[0], prompts[-1]):
        for is_chat in (True, False):
            for _ in range(ATTEMPTS):
                texts = []
                for form in (Form(is_chat), Form(is_chat, is_streamed=True)):
                    salt = f"{report.run_id}-{form.name}-{prompt.prompt_id}"
                    got = await ask(front, prompt.text, report.sampling, form, salt=salt)
                    texts.append(got.text)
                    if got.defect is not None:
                        defects.append(f"{prompt.prompt_id}, {form.name}: {got.defect}")
                if texts[0] == texts[1]:
                    break
            else:
                unequal.append(f"{prompt.prompt_id}, {Form(is_chat).name}: {texts}")
    report.check("every form is whole", not defects, "; ".join(defects) or f"{len(FORMS)} forms")
    report.check(
        "streamed and whole forms agree",
        not unequal,
        "; ".join(unequal) or f"within {ATTEMPTS} attempts",
    )


async def _check_echo(report: SuiteReport, front: Endpoint, prompt: Prompt) -> None:
    """The prompt back, or a clear refusal."""
    more = {"echo": True, "max_tokens": 0}
    form = Form(is_chat=False)
    echo = await ask(front, prompt.text, report.sampling, form, more=more)
    is_right = echo.status == 200 and prompt.text in echo.text
    is_clear = 400 <= echo.status < 500 and bool(echo.error)
    report.check(
        "echo without tokens",
        is_right or is_clear,
        f"HTTP {echo.status}: {(echo.error or echo.text)[:80]}",
    )


async def _check_front(report: SuiteReport, front: Endpoint) -> None:
    """The router's health and models are there where requests go."""
    health = await front.post_json("/health", method="GET")
    report.check("router health", health.status_code == 200, f"HTTP {health.status_code}")
    models = await front.post_json("/v1/models", method="GET")
    served = (front.model or "") in models.text
    report.check("router lists the model", served, f"HTTP {models.status_code}")


SUITE = Suite(
    name=NAME,
    title="Compares answers through a router before a pair with those of one engine.",
    proves="A prompt computed elsewhere is really handed over, and answered as one engine would.",
    document=Document.HAND_OFF,
    run=run,
    aliases=("test_pd_accuracy", "run_accuracy_test"),
    groups=("quick",),
    needs=(PAIR,),
    needs_router=True,
    needs_pair=True,
    small_s=90.0,
)
