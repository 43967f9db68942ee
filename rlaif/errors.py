"""The one tree of errors. They travel untouched; the command line prints them and exits with `exit_code`.

A message is one line: what is wrong, then what to do. Add a class here only when a caller or a shell
script would act on it differently, and give it an exit code of its own.
"""


class RlaifError(Exception):
    """Anything this project reports to its user on purpose."""

    exit_code = 1


class ConfigError(RlaifError, ValueError):
    """A flag, a config file or a combination of them that cannot work."""

    exit_code = 2


class DataError(RlaifError, ValueError):
    """An input file that is missing, unreadable, or has no usable row."""

    exit_code = 3


class ContextTooLong(DataError):
    """A conversation with more tokens than the limit; a server answers it for that item alone."""


class ModelError(RlaifError, ValueError):
    """A model or checkpoint that is unknown, incomplete, or of the wrong kind for the task."""

    exit_code = 4


class EndpointError(RlaifError, ConnectionError):
    """An LLM endpoint that cannot be reached or refuses every request.

    Attributes:
        fault: what is wrong, without `advice`: what whoever ran the command can do, which is nothing to say to those
            whom a server answers.
    """

    exit_code = 5

    def __init__(self, fault: str, *, advice: str = "") -> None:
        super().__init__(f"{fault} {advice}".rstrip())
        self.fault = fault


class RewardServerError(RlaifError, ConnectionError):
    """A reward server that cannot be reached, is not ready, or serves another model than was asked for."""

    exit_code = 6


class StorageError(RlaifError, OSError):
    """Output that cannot be written, or is not this run's to write.

    A full disk, a read-only folder, a damaged file; a run directory that another process writes, or that holds a run of
    another command or with other settings.
    """

    exit_code = 7


class QualityError(RlaifError, RuntimeError):
    """Work that finished but must not be trusted: too many rows unlabelled, too many rewards missing."""

    exit_code = 8


class SelfCheckError(RlaifError, RuntimeError):
    """A start-up self-check that failed; the message names the cause."""

    exit_code = 9


class BudgetReached(RlaifError, RuntimeError):
    """Work that stopped at its limit of cost. What was paid for is kept, and a larger limit goes on from there."""

    exit_code = 10
