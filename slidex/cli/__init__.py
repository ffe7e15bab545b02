"""The command line: parse, call the library, map errors to exit codes.

Results go to standard output, progress and logs to standard error. Heavy modules are imported inside the commands,
so that ``--help`` answers at once.

Exit codes: 0 done, 1 handled failure, 2 usage or settings, 3 bad data, 4 diverged, 75 stopped by a signal after
saving, 130 interrupted without saving.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from slidex import __version__
from slidex.cli.evaluate import evaluate, predict
from slidex.cli.inspect import doctor, inspect
from slidex.cli.prepare import prepare
from slidex.cli.train import train
from slidex.errors import SlidexError


class ErrorMappingGroup(click.Group):
    """A group whose commands' SlidexErrors become one line on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except SlidexError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # the reader of our output went away, as `| head` does
            sys.stderr.close()
            ctx.exit(1)


@click.group(
    cls=ErrorMappingGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "SLIDEX",
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="slidex")
def main() -> None:
    r"""Train and serve classifiers with very many classes.

    \b
    Examples:
      slidex prepare python-source --out data
      slidex train data --out run && slidex eval run data
    """


for command in (prepare, train, evaluate, predict, inspect, doctor):
    main.add_command(command)
