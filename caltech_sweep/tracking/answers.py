"""What the answer of a tracking or artifact store means for the write that got it: one table for all of them.

LATER    the store is away, busy or full: the same write may be taken later
OURS     it does not let us in: someone must renew what we sign in with, or the certificate that we trust
UNSURE   it failed at this write; where it takes others meanwhile, it will never take this one
NEVER    it will never take this write
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum

import requests
import sqlalchemy as sa
from mlflow.exceptions import MlflowException

from caltech_sweep.errors import StoreError


class Answer(Enum):
    """What an error means for a write."""

    LATER = "is unavailable"
    OURS = "does not let this process in"
    UNSURE = "fails at a write"
    NEVER = "refuses a write"


_BY_STATUS = {
    **dict.fromkeys((401, 403, 407, 511), Answer.OURS),
    **dict.fromkeys((408, 421, 423, 425, 429, 499, 502, 503, 504, 507, 509), Answer.LATER),
    409: Answer.UNSURE,
}
_OF_A_PROXY = (402, 404, 405, 410, 451)  # unless MLflow says so itself, the store is not reached, for now or for good
_SIGN_IN = "renew what MLflow signs in with (MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD)"
_CERTIFICATE = (
    "name the server's certificate authority with REQUESTS_CA_BUNDLE or MLFLOW_TRACKING_SERVER_CERT_PATH, and your own "
    "certificate, where it wants one, with MLFLOW_TRACKING_CLIENT_CERT_PATH"
)
_STATUS = re.compile(r"failed with error code (?P<one>\d{3})\b|too many (?P<other>\d{3}) error responses")
_BAD_HEADER = re.compile("in header value|codec can't encode")  # of a token or a password that no request can hold
_TLS = re.compile(r"certificate|\bSSL|\bTLS", re.I)
_PAGE = re.compile("not in a valid JSON format|<html|<!doctype", re.I)  # what a login page or a proxy answers
_AWAY = re.compile(
    r"failed with exception|max retries exceeded|connection (refused|reset|aborted|is closed|already closed)|timed out"
    r"|database is locked|disk i/o error|disk is full|unable to open database|readonly database|no space left"
    r"|server closed the connection|terminating connection|\.InterfaceError\)",
    re.I,
)
_DATABASE = (sa.exc.OperationalError, sa.exc.InterfaceError)
_OF_THE_WRITE = (ValueError, TypeError, LookupError, AttributeError, sa.exc.SQLAlchemyError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that a server has answered, whichever library says so; None where none has."""
    for cause in _causes(error):
        if found := _STATUS.search(str(cause)):
            return int(found["one"] or found["other"])
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # of botocore
            response = response.get("ResponseMetadata", {})
        for name in ("status_code", "HTTPStatusCode", "code"):
            for holder in (response, cause):
                value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
                if isinstance(value, int) and 300 <= value < 600:
                    return value
    return None


def meaning(error: BaseException) -> Answer:
    """Return what an error that a write to a store has raised means for the write."""
    text, status = str(error), status_of(error)
    ours = _TLS.search(text) or _BAD_HEADER.search(text)
    if isinstance(error, requests.exceptions.SSLError) or ("failed with exception" in text and ours):
        return Answer.OURS
    if status is not None:
        return Answer.UNSURE if status in _OF_A_PROXY else _of_status(status)
    if isinstance(error, FileNotFoundError):
        return Answer.NEVER
    if isinstance(error, (OSError, StoreError, *_DATABASE)) or _AWAY.search(text):  # those of requests are OSErrors
        return Answer.LATER
    if isinstance(error, MlflowException):
        if _PAGE.search(text):
            return Answer.OURS
        return _of_status(error.get_http_status_code())
    return Answer.NEVER if isinstance(error, _OF_THE_WRITE) else Answer.UNSURE


def _of_status(status: int) -> Answer:
    return _BY_STATUS.get(status, Answer.NEVER if status < 500 else Answer.UNSURE)


def advice(error: BaseException) -> str:
    """Return what a person does about a store that does not let us in."""
    return _CERTIFICATE if _TLS.search(str(error)) else _SIGN_IN
