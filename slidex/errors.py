"""The errors slidex raises on purpose, one class for each cause; the CLI maps them to exit codes."""


class SlidexError(Exception):
    """Base of every error slidex raises on purpose."""

    exit_code = 1


class ConfigError(SlidexError, ValueError):
    """A setting is unknown, out of range, or in conflict with another."""

    exit_code = 2


class DataError(SlidexError, ValueError):
    """Input data break the format.

    Args:
        message: What was expected and what was found.
        path: The file, or the directory of a data set.
        line: 1-based line number, where there is one.
        column: 1-based byte column within the line, where there is one.
    """

    exit_code = 3

    def __init__(
        self, message: str, *, path: object = None, line: int | None = None, column: int | None = None
    ) -> None:
        place = ":".join(str(part) for part in (path, line, column) if part is not None)
        super().__init__(f"{place}: {message}" if place else message)
        self.path, self.line, self.column = path, line, column


class CheckpointError(SlidexError):
    """A run directory is missing, altered, or does not fit what it is used with."""


class DivergedError(SlidexError):
    """The loss became non-finite; the step that would have used it was not taken."""

    exit_code = 4


class InterruptedRunError(SlidexError):
    """A signal stopped the run after its state was saved."""

    exit_code = 75


class LostPeerError(SlidexError):
    """Another process of a job on several processes has ended or stopped answering."""

    exit_code = 69


class MissingExtraError(SlidexError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class DeviceError(SlidexError):
    """A GPU was asked for and cannot be used; the message says what is missing and what to install or change."""


class CollapseWarning(UserWarning):
    """The negative classes of a run look too narrow; the message names the settings to change."""
