"""Why a tracking server lets nobody in, and what to do: in place of what urllib3, requests and the server's page say."""

from __future__ import annotations

from dataclasses import dataclass

_HOW_TO_NAME = "--tracking-uri, tracking.uri or MLFLOW_TRACKING_URI"


@dataclass(frozen=True, kw_only=True)
class NoEntry:
    """said: after the server's address.   advice: what to do."""

    said: str
    advice: str


# By the error_code that MLflow gives an answer's status.
_REFUSALS = {
    "UNAUTHENTICATED": NoEntry(
        said="does not know this user or password (401)",
        advice="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    "PERMISSION_DENIED": NoEntry(
        said="does not allow this user (403)", advice="ask its administrator, or sign in by another MLFLOW_TRACKING_USERNAME"
    ),
    "ENDPOINT_NOT_FOUND": NoEntry(said="is no MLflow server (404)", advice=f"name one by {_HOW_TO_NAME}"),
}


def no_entry(error: BaseException) -> NoEntry | None:
    """None where the server was reached, let us in, and failed at something else."""
    from requests import exceptions

    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    if any(isinstance(each, exceptions.SSLError) for each in chain):
        advice = "name its authority by MLFLOW_TRACKING_SERVER_CERT_PATH"
        return NoEntry(said="has a certificate that is not trusted", advice=advice)
    if any(isinstance(each, exceptions.ConnectionError | exceptions.Timeout) for each in chain):
        return NoEntry(said="does not answer", advice=f"start the server, or name another by {_HOW_TO_NAME}")
    return _REFUSALS.get(getattr(error, "error_code", ""))
