"""Typed errors of the data way: what broke, in which sample, and what to do.

Every error carries the sample's (or shard's) key and a short `reason`, the slug under which the ledger counts it.
All derive from `ValueError`: they report bad input, never a defect of this program.
"""

from __future__ import annotations


class DataError(ValueError):
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
