"""What the failure of a call says: MLflow is away, refuses this record, or refuses this user.

Calls fail in many types: MLflow's own exception for what its REST API answers, requests' for a
proxy or an artifact server, botocore's for S3, OSError for a folder, ImportError for a storage
client that is not installed.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import requests
from mlflow.exceptions import MlflowException

from tunix_mlflow.files import one_line

_DENIALS = (401, 403, 407)
_WORTH_A_RETRY = (408, 425, 429)
_NEVER = (501, 505, 507, 511)  # the only ones above 499 that tell of the record, or of a quota
_NO_RETRY = (400, 405, 411, 413, 414, 415, 422, 431)  # the same request gets the same answer
_LOCAL = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
)
_BUSY = "database is locked"  # SQLite, by another process
_RACES = ("UNIQUE constraint failed", "duplicate key value", "Duplicate entry")
"""SQLite's, PostgreSQL's and MySQL's words where two have inserted the same at once."""
_CREDENTIALS = re.compile(r"://[^/@\s]+@")
_STATUS = re.compile(r"failed with error code (\d{3})\b|too many (\d{3}) error responses")
_TRIES, _TRIES_OF_A_FAILURE = 3, 5


class Undeliverable(Exception):
    """A record that cannot be delivered, whatever the server says; the message says why."""


class Answer(NamedTuple):
    """What a failed call says."""

    why: str  # in one line
    tries: int | None  # after so many it is a refusal of the record; None: MLflow is away
    status: int | None = None  # of HTTP
    retry_after: float = 0.0  # seconds, if the server named them

    @property
    def is_denial(self) -> bool:
        """Whether it may concern the user rather than the record."""
        return self.status in _DENIALS

    @property
    def may_pass(self) -> bool:
        """Whether it tells of the server rather than of the record, so that it may pass."""
        return self.tries == _TRIES_OF_A_FAILURE

    @property
    def may_be_split(self) -> bool:
        """Whether a part of the request may be taken."""
        return self.status in (400, 413, 414, 422, 431)


def understand(error: Exception) -> Answer:
    """Return what an error of a call to MLflow says."""
    if isinstance(error, Undeliverable):
        return Answer(str(error), 1)
    why = _CREDENTIALS.sub("://", one_line(error))
    status = http_status(error)
    if isinstance(error, ImportError):
        return Answer(f"{error.name or why} is not installed; the artifact store needs it", 1)
    if _BUSY in why or (
        not _STATUS.search(str(error)) and any(_is_unanswered(one) for one in _chain(error))
    ):
        return Answer(why, None)
    if any(words in why for words in _RACES):
        return Answer(why, _TRIES, status)  # by then it is there
    if status is not None:
        if status in _WORTH_A_RETRY:
            return Answer(why, None, status, _retry_after(error))
        if status < 500 or status in _NEVER:
            return Answer(why, 1 if status in _NO_RETRY else _TRIES, status)
        # Only this record may make the server fail.
        return Answer(why, _TRIES_OF_A_FAILURE, status, _retry_after(error))
    if isinstance(error, json.JSONDecodeError):  # requests' too
        return Answer(f"an answer that is not MLflow's: {why}", None)
    if isinstance(error, OSError):
        if error.errno in _LOCAL:
            return Answer(f"{why}: {error.filename}" if error.filename else why, _TRIES)
        return Answer(why, None)
    if isinstance(error, TypeError | ValueError):
        return Answer(why, 1)  # the client could not send it, and never will
    return Answer(why, _TRIES_OF_A_FAILURE)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error tells of; None if it tells of none.

    The text comes first: MLflow has no error code for most statuses, and then claims 500; requests
    counts the failures that it has retried.
    """
    for one in _chain(error):
        if named := _STATUS.search(str(one)):
            return int(named[1] or named[2])
        response = getattr(one, "response", None)
        if isinstance(response, requests.Response):
            return int(response.status_code)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return int(status) if status else None
        if isinstance(one, MlflowException):
            return int(one.get_http_status_code())
    return None


def _is_unanswered(error: BaseException) -> bool:
    return isinstance(error, requests.RequestException) and error.response is None


def _retry_after(error: BaseException) -> float:
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, requests.Response):
            given = response.headers.get("Retry-After", "")
            return min(60.0, float(given)) if given.isdigit() else 0.0
    return 0.0


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    one: BaseException | None = error
    for _ in range(10):
        if one is None:
            return
        yield one
        one = one.__cause__ or one.__context__
