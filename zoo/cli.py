"""The command line: `zoo COMMAND`. This file holds what all commands share, and the table of where each one lives.

A command's module is imported when the command runs; `zoo --help` reads the table and imports none of them. A command
is a click command made with `command()`, whose function gets an `Out` as its first argument:

    @command("count", "Count tensors.")
    @click.argument("ref")
    def count(out: Out, ref: str) -> int | None: ...

It may return an exit status (0 where it returns None); any exception ends in `Out.fail`, the one error table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from zoo.errors import NO, USAGE
from zoo.out import Out

if TYPE_CHECKING:
    from zoo.host import Host

# name: (where it lives, what `zoo --help` says of it)
COMMANDS = {
    "list": ("zoo.cli_catalogue:list_", "List the models of the catalogue."),
    "show": ("zoo.cli_catalogue:show", "Show the parts and tensors of a checkpoint, from its headers."),
    "pull": ("zoo.cli_catalogue:pull", "Bring a checkpoint to this machine."),
    "plan": ("zoo.cli_graft:plan", "Show where each tensor of your module would come from; write nothing."),
    "graft": ("zoo.cli_graft:graft", "Fill your module with pretrained weights, prove it, and write them."),
    "verify": ("zoo.cli_verify:verify", "Run the proof of a graft again, from its files."),
    "diff": ("zoo.cli_diff:diff", "Compare two checkpoints: same, renamed, changed, absent."),
    "run": ("zoo.cli_run:run", "Run a model on a text, an image, a recording or a series."),
    "suggest": ("zoo.cli_run:suggest", "Suggest what to start from."),
    "plugins": ("zoo.cli_plugins:plugins", "List the plugins, and check one."),
}

CONTEXT = {"help_option_names": ["-h", "--help"]}

_EPILOG = """\
REF is name[.tag][@revision][#part] as in bert, minilm#encoder (or minilm-encoder), bert.large@main; or hf:org/repo,
file:path, package:dist/path.

\b
Exit status: 0 yes; 1 the answer is no; 2 usage, bad input or a missing extra; 3 hub, network, authorisation.
"""


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command takes; the function gets them as one `Out`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object, also on failure.")
    @click.option("-q", "--quiet", is_flag=True, help="Print the bare answer, and no notes or hints.")
    @click.option("-v", "--verbose", is_flag=True, help="Print tracebacks, also of faulty plugins.")
    @wraps(function)
    def wrapped(*args: Any, as_json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        context = click.get_current_context()
        out = Out(as_json=as_json, quiet=quiet, verbose=verbose)
        context.obj = out
        try:
            status = function(out, *args, **kwargs)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            status = out.fail(error)
        if status or context.invoked_subcommand is None:  # else a group that goes on to its subcommand
            context.exit(status or 0)

    return wrapped


def command(name: str, help: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command with the common options and the error table around it."""

    def make(function: Callable[..., Any]) -> click.Command:
        return click.command(name, help=help, context_settings=CONTEXT, **settings)(common(function))

    return make


def host_for(out: Out) -> Host:
    """The host of a command: faults of plugins go to its stderr, with the traceback where -v asks for it."""
    from zoo.host import Host

    host = Host(warn=out.warn)
    if out.verbose:
        for plugin in host.plugins:
            for problem in plugin.problems:
                out.warn(f"plugin {plugin}: {problem.traceback or problem.what}".rstrip())
    return host


class _Lazy(click.Group):
    """A group that knows its commands from a table, and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        found: click.Command = getattr(import_module(module), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in COMMANDS:
            from zoo.errors import did_you_mean

            near = did_you_mean(name, list(COMMANDS))
            ctx.fail(f'zoo has no command "{name}"{"; " if near else ""}{near}')
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import zoo

        click.echo(f"weightzoo {zoo.__version__}")
        ctx.exit()


@click.group(cls=_Lazy, epilog=_EPILOG, context_settings=CONTEXT)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def cli() -> None:
    """Pretrained models by name, and their weights in your own module, proven."""


def main(args: list[str] | None = None) -> int:
    """Run the command line and give the exit status. The console script exits with it."""
    args = sys.argv[1:] if args is None else args
    try:
        status = cli.main(args, prog_name="zoo", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return USAGE
    except click.ClickException as error:
        # Found while the arguments were parsed, so the options are not known yet: look for the one that matters.
        return Out(as_json="--json" in args).fail(error)
    except click.Abort:
        return Out(as_json="--json" in args).fail(KeyboardInterrupt())
    except BrokenPipeError:
        # Whoever read our output has had enough. Point stdout nowhere, or the interpreter complains when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO


if __name__ == "__main__":
    sys.exit(main())
