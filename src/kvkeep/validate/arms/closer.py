"""What suites found wrong, looked into: their reports then say which way to the KV is wrong."""

from collections.abc import Sequence

from kvkeep.validate.arms.bisection import bisect, suspicious
from kvkeep.validate.arms.comparing import Asking, Before
from kvkeep.validate.arms.standard import Means
from kvkeep.validate.suite.base import Context, Report, SuiteReport


def means_of(context: Context, restart: Before | None) -> Means:
    """What arms can be made of for a suite's subject.

    Args:
        context: The suite's.
        restart: Restarts the engine under test; None where that is not possible.
    """
    subject = context.subject
    return Means(
        subject.engine,
        subject.daemon,
        subject.other,
        # A router before engines that do everything themselves hands nothing over.
        subject.front if subject.decode else None,
        subject.tiers,
        restart,
    )


async def look_closer(reports: Sequence[Report], context: Context, restart: Before | None) -> None:
    """Ask again, in every arm, what these reports have wrong; it is noted in them.

    Args:
        reports: Of one suite.
        context: It ran in this one.
        restart: As for ``means_of``.
    """
    for report in reports:
        if not isinstance(report, SuiteReport) or not (items := suspicious(report.judged)):
            continue
        report.suspects = await bisect(
            items,
            means_of(context, restart),
            Asking(
                report.sampling,
                context.subject.capabilities.block_tokens,
                report.exact,
                report.noise_nats,
                context.progress,
            ),
            run_id=report.run_id,
            new_run_id=context.new_run_id,
        )
