"""Why a tracking server cannot be used, and what to do about it. Replaces the messages of urllib3, requests and the server."""

from __future__ import annotations

from typing import NamedTuple

from pipelines.storage.redaction import without_credentials

_HOW_TO_NAME = "--tracking-uri, tracking.uri or MLFLOW_TRACKING_URI"


class AccessProblem(NamedTuple):
    """reason: follows the server's address in a sentence.   advice: what to do."""

    reason: str
    advice: str


# By the error_code that MLflow derives from the status of an HTTP response.
_REFUSALS = {
    "UNAUTHENTICATED": AccessProblem(
        "does not know this user or password (401)",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    "PERMISSION_DENIED": AccessProblem(
        "does not allow this user (403)", "ask its administrator, or sign in with another MLFLOW_TRACKING_USERNAME"
    ),
    "ENDPOINT_NOT_FOUND": AccessProblem("is not an MLflow server (404)", f"set one with {_HOW_TO_NAME}"),
}


NO_ANSWER = AccessProblem("does not answer", f"start the server, or set another one with {_HOW_TO_NAME}")


def is_away(error: BaseException) -> bool:
    """Whether the server, or one before it, may answer later."""
    return access_problem(error) is NO_ANSWER or getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE"


def access_problem(error: BaseException) -> AccessProblem | None:
    """None if the server was reached and accepted the user, and something else failed."""
    from requests import exceptions

    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    if any(isinstance(each, exceptions.SSLError) for each in chain):
        advice = "set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate of its authority"
        return AccessProblem("has a certificate that is not trusted", advice)
    if any(isinstance(each, exceptions.ConnectionError | exceptions.Timeout) for each in chain):
        return NO_ANSWER
    return _REFUSALS.get(getattr(error, "error_code", ""))


def first_line(error: BaseException) -> str:
    return without_credentials((str(error).splitlines() or [type(error).__name__])[0])[:200]
