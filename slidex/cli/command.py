"""What every command has in common: examples in its help, errors as exit codes, signals, JSON on standard output."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

import click

from slidex.errors import InterruptedRunError, SlidexError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

EXIT_FAILURE, EXIT_SIGINT, EXIT_SIGTERM = 1, 130, 143


class Command(click.Command):
    """A command whose help ends with examples, one a line, each of which works as it stands."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Adds the examples."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


class Group(Command, click.Group):
    """A group of such commands."""

    command_class = Command


class MainGroup(Group):
    """The group at the top: a failure that is not a bug becomes one line on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a name the terminal cannot show is no failure
        try:
            with _sigterm_unwinds():
                return super().invoke(ctx)
        except InterruptedRunError as error:
            _leave(ctx, str(error), error.exit_code)
        except SlidexError as error:
            _leave(ctx, f"Error: {error}", error.exit_code)
        except KeyboardInterrupt:
            _leave(ctx, "Interrupted.", EXIT_SIGINT)
        except _Terminated:
            _leave(ctx, "Terminated.", EXIT_SIGTERM)
        except BrokenPipeError:  # our reader went away, as `| head` does: click exits 1 in silence
            raise
        except OSError as error:
            place = f"{error.filename}: " if error.filename is not None else ""
            _leave(ctx, f"Error: {place}{error.strerror or error}.", EXIT_FAILURE)
        except MemoryError as error:
            _leave(ctx, f"Error: out of memory. {error}".rstrip(), EXIT_FAILURE)


def echo_json(value: Any, *, indent: int | None = None) -> None:
    """Prints a value as JSON in UTF-8, whatever the terminal's encoding; a lone surrogate becomes its escape."""
    click.echo(json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def _leave(ctx: click.Context, message: str, code: int) -> NoReturn:
    click.echo(message, err=True)
    ctx.exit(code)


class _Terminated(BaseException):
    """SIGTERM, as Ctrl-C is KeyboardInterrupt: it unwinds the stack, so that temporary files are removed."""


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """While entered, SIGTERM raises `_Terminated`. Training puts its own handler over this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(_number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
