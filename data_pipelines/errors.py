"""Typed errors: what the user can mend, told from defects of this program, and what broke in which sample.

A `UserError` ends a command in one message and exit code 2; every other exception, a plain `ValueError` included, in
its traceback. A `DataError` carries the sample's (or shard's) key and a short `reason`, the slug under which the ledger
counts it.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad settings, files or data: the message names key, value and remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named is not there."""


class DataError(UserError):
    """Bad input. `key` names the sample or shard, `reason` is the ledger's slug (lower case, words joined by '_')."""

    def __init__(self, key: str, reason: str, message: str) -> None:
        super().__init__(f"{key}: {message} [{reason}]")
        self.key = key
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str]]:
        return type(self), (self.key, self.reason, self.message)


class ShardError(DataError):
    """A shard that cannot be trusted: cut, corrupt header, duplicate or scattered keys, missing file."""


class RecordError(DataError):
    """A sample whose JSON does not follow the record form. The message names the field and its value."""


class MediaError(DataError):
    """An image or clip that is missing, over its byte or pixel budget, or does not decode."""


class BudgetError(DataError):
    """A sample that cannot be made to fit its pack. The message names its tokens and the limit."""


class PlanMismatch(RuntimeError):  # noqa: N818 (a defect, not an error of the user's)
    """Encoded counts differ from planned ones: a defect of this program, reported with the sample's key."""
