"""What a failed call says, for each kind of error that MLflow's clients raise."""

from __future__ import annotations

import errno
import json

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException

from tunix_mlflow.tracking.sync.answers import Undeliverable, understand


def http_error(status: int, **headers: str) -> requests.HTTPError:
    """As an artifact server's answer is raised."""
    response = requests.Response()
    response.status_code = status
    response.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return requests.HTTPError(f"{status} for you", response=response)


def html(status: int) -> MlflowException:
    """As MLflow raises what a proxy answers."""
    text = f"API request to endpoint /api/2.0/mlflow/runs/log-batch failed with error code {status}"
    return MlflowException(f"{text} != 200. Response body: '<html>'")


def unanswered() -> MlflowException:
    """As MLflow raises a connection that fails."""
    try:
        try:
            raise requests.ConnectionError("refused")
        except requests.ConnectionError as error:
            raise MlflowException("API request failed with exception refused") from error
    except MlflowException as error:
        return error


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"An error occurred ({status})")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


AWAY, AT_ONCE, SOON, LATER = None, 1, 3, 5


@pytest.mark.parametrize(
    ("error", "tries", "status"),
    [
        (http_error(413), AT_ONCE, 413),
        (http_error(403), SOON, 403),
        (http_error(404), SOON, 404),
        (http_error(409), SOON, 409),
        (http_error(507), SOON, 507),
        (http_error(429), AWAY, 429),
        (http_error(500), LATER, 500),
        (http_error(503), LATER, 503),
        (html(413), AT_ONCE, 413),
        (html(403), SOON, 403),
        (html(502), LATER, 502),
        (
            RestException(
                {"error_code": "BAD_REQUEST", "message": "UNIQUE constraint failed: datasets.name"}
            ),
            SOON,
            400,
        ),
        (RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "a"}), AT_ONCE, 400),
        (RestException({"error_code": "PERMISSION_DENIED", "message": "a"}), SOON, 403),
        (RestException({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "a"}), AWAY, 429),
        (RestException({"error_code": "INTERNAL_ERROR", "message": "a"}), LATER, 500),
        (MlflowException("(sqlite3.OperationalError) database is locked"), AWAY, None),
        (unanswered(), AWAY, None),
        (requests.Timeout("slow"), AWAY, None),
        (ConnectionResetError("reset"), AWAY, None),
        (requests.exceptions.RetryError("too many 500 error responses"), LATER, 500),
        (requests.exceptions.RetryError("too many 429 error responses"), AWAY, 429),
        (ClientError(403), SOON, 403),
        (ClientError(503), LATER, 503),
        (ModuleNotFoundError("No module named 'boto3'", name="boto3"), AT_ONCE, None),
        (OSError(errno.EACCES, "Permission denied", "/artifacts"), SOON, None),
        (OSError(errno.EROFS, "Read-only file system", "/artifacts"), SOON, None),
        (OSError(errno.ENOSPC, "No space left on device"), SOON, None),
        (json.JSONDecodeError("Expecting value", "<html>", 0), AWAY, None),
        (ValueError("too long"), AT_ONCE, None),
        (TypeError("not that"), AT_ONCE, None),
        (Undeliverable("gone"), AT_ONCE, None),
        (RuntimeError("of a storage client"), LATER, None),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, Exception) else None,
)
def test_each_kind_of_error(error: Exception, tries: int | None, status: int | None) -> None:
    """None: MLflow is away; else after how many tries the record is refused."""
    found = understand(error)
    assert (found.tries, found.status) == (tries, status)
    assert "\n" not in found.why


def test_a_server_that_names_a_time() -> None:
    """Retry-After is kept to, up to a minute."""
    assert understand(http_error(429, Retry_After="7")).retry_after == 7
    assert understand(http_error(503, Retry_After="3600")).retry_after == 60
    assert understand(http_error(503, Retry_After="Wed, 21 Oct")).retry_after == 0


def test_no_password_is_shown() -> None:
    """URLs with credentials are in the messages of many clients."""
    error = MlflowException("API request to http://user:secret@host/api failed with exception x")
    assert understand(error).why == "API request to http://host/api failed with exception x"
