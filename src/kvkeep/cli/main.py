"""``kvkeep``: a group that imports a command only when it is asked for.

Bad input and what is not there end as one sentence on stderr and exit code 2; anything else that
escapes a command is a fault of kvkeep, and shows where.
"""

import importlib
from collections.abc import Mapping

import click

from kvkeep.model.errors import InvariantError, KvkeepError

EXIT_REFUSED = 2
COMMANDS: Mapping[str, str] = {
    "demo": "kvkeep.cli.demo:demo",
    "up": "kvkeep.cli.up:up",
    "wait": "kvkeep.cli.wait:wait",
    "down": "kvkeep.cli.down:down",
    "check": "kvkeep.cli.check:check",
    "status": "kvkeep.cli.status:status",
    "daemon": "kvkeep.cli.daemon:daemon",
    "route": "kvkeep.cli.route:route",
    "announce": "kvkeep.cli.announce:announce",
    "forward": "kvkeep.cli.forward:forward",
    "top": "kvkeep.cli.top:top",
    "doctor": "kvkeep.cli.doctor:doctor",
    "cache": "kvkeep.cli.cache:cache",
    "cartridge": "kvkeep.cli.cartridge:cartridge",
    "why-miss": "kvkeep.cli.why_miss:why_miss",
}
"""``module:function`` by command, in the order in which a newcomer needs them."""


class LazyGroup(click.Group):
    """Commands out of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None for a name that is none."""
        target = COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, function = target.partition(":")
        command = getattr(importlib.import_module(module), function)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; what kvkeep raises on purpose becomes a sentence."""
        try:
            return super().invoke(ctx)
        except InvariantError:
            raise
        except KvkeepError as error:
            click.echo(f"kvkeep {ctx.invoked_subcommand}: {error}", err=True)
            ctx.exit(EXIT_REFUSED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kvkeep", message="%(prog)s %(version)s")
def main() -> None:
    """Keep the KV cache of LLM serving, and prove that reused KV answers as recomputation would."""
