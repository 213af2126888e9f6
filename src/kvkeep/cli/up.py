"""``kvkeep up``: start a stack, and keep it up until Ctrl-C, or let it run behind."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from kvkeep.cli.target import describe, show
from kvkeep.cli.watching import watch
from kvkeep.model.errors import InputError, KvkeepError, UnavailableError
from kvkeep.stack.machine import check_machine
from kvkeep.stack.models import check_model
from kvkeep.stack.precedence import load_spec
from kvkeep.stack.process import telling_line
from kvkeep.stack.progress import Progress
from kvkeep.stack.record import FolderLock, StackRecord, await_record
from kvkeep.stack.spec import StackSpec
from kvkeep.stack.supervisor import Stack

EXIT_INTERRUPTED = 130
SLACK_S = 30.0
"""Beyond the stack's own time-outs, before its supervisor itself counts as stuck."""
MODEL_TIMEOUT_S = 600.0
"""A first start may convert the model."""

FLAGS: Mapping[str, tuple[str, str]] = {
    "--model": ("model", "Model: smollm2, a folder, or a Hugging Face id."),
    "--port": ("engines.0.port", "Port of the first engine."),
    "--pool-bytes": ("daemon.pool_bytes", "Size of the daemon's pool, such as 2GiB."),
    "--state-dir": ("state_dir", "Folder for logs and state."),
    "--start-timeout": ("start_timeout_s", "Longest wait for one process, in seconds."),
}
"""Field by flag, and its help."""


def _field_options(command: click.decorators.FC) -> click.decorators.FC:
    for flag, (_, text) in reversed(list(FLAGS.items())):
        command = click.option(flag, help=text)(command)
    return command


@click.command()
@click.argument("stack_file", metavar="STACK.yaml", type=click.Path(path_type=Path))
@click.option("--detach", is_flag=True, help="Return when ready; `kvkeep down` stops it.")
@click.option("--set", "sets", multiple=True, metavar="FIELD=VALUE", help="Set any field.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@_field_options
def up(
    stack_file: Path,
    detach: bool,
    sets: Sequence[str],
    as_json: bool,
    quiet: bool,
    **flags: str | None,
) -> None:
    """Start the daemon, the engines and the router of STACK.yaml, and stop them all at the end.

    Exit code 0 after a stop that was asked for, 2 if it could not start or could not go on.
    """
    texts = [*sets]
    for flag, (field, _) in FLAGS.items():
        value = flags[flag.removeprefix("--").replace("-", "_")]
        texts += [f"{field}={value}"] if value is not None else []
    spec = load_spec(stack_file, texts)
    if detach:
        record = _run_behind(spec, stack_file, texts, quiet)
        _print(record, spec.state_path.resolve(), as_json)
        return
    sys.exit(_run(spec, as_json, quiet))


def _print(record: StackRecord, folder: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(describe(record, folder)))
    else:
        show(record, folder)
    sys.stdout.flush()


class _Interrupted(BaseException):
    """SIGTERM, SIGHUP or Ctrl-C; not an Exception, so that nothing on the way swallows it."""


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn the first signal into an exception; later ones must not disturb the stop."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise _Interrupted

    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _run(spec: StackSpec, as_json: bool, quiet: bool) -> int:
    """Run a stack until a signal; returns the exit code."""
    is_ready = False
    try:
        with _signals_raise(), Stack(spec, progress=Progress(quiet=quiet)) as stack:
            is_ready = True
            _print(stack.record(), stack.folder, as_json)
            if not as_json:
                click.echo("Ctrl-C stops it.")
            try:
                watch(stack)
            except KvkeepError as error:
                stack.fail(str(error))  # `kvkeep wait` and `kvkeep status` say why
                raise
    except _Interrupted:
        return 0 if is_ready else EXIT_INTERRUPTED


def _run_behind(
    spec: StackSpec, stack_file: Path, texts: Sequence[str], quiet: bool
) -> StackRecord:
    """Start a supervisor that outlives this command, and wait until the stack is ready.

    Raises:
        InputError: The stack can't run here, or is up already; nothing was changed.
        UnavailableError: It did not start; everything is stopped again.
    """
    folder = spec.state_path.resolve()
    for model in spec.models:
        check_model(model)
    FolderLock.taken(folder).give_back()
    check_machine(spec)
    log = folder / "logs" / "supervisor.log"
    command = [sys.executable, "-m", "kvkeep", "up", str(stack_file), "--quiet", "--json"]
    for text in texts:
        command += ["--set", text]
    supervisor = _start_supervisor(command, log)
    timeouts_s = [spec.start_timeout_s, *(each.start_timeout_s or 0.0 for each in spec.engines)]
    longest_s = MODEL_TIMEOUT_S + 3 * max(timeouts_s) + SLACK_S
    try:
        with (
            _signals_raise(),
            Progress(quiet=quiet) as progress,
            progress.task(f"stack {spec.name}") as task,
        ):
            return await_record(folder, longest_s, supervisor=supervisor, said=task.say)
    except _Interrupted:
        supervisor.terminate()
        supervisor.wait()
        sys.exit(EXIT_INTERRUPTED)
    except UnavailableError as error:
        supervisor.terminate()
        supervisor.wait()
        if str(error):
            raise
        # It ended before it wrote a record, and said why where its output goes.
        said = telling_line(log.read_text(errors="replace")).removeprefix("kvkeep up: ")
        raise UnavailableError(said) from error


def _start_supervisor(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise InputError(
            f"{log} can't be written ({error.strerror}): choose another state_dir."
        ) from error
