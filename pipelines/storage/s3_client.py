"""The client of an object store, and the meaning of its errors: the only module that imports boto3.

boto3 is imported when it is used, so a configuration with an S3Config loads fast. Every error becomes a StorageError: one sentence
with the URI and what to do. Credentials come only from boto3's own chain and appear in no message.
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from pipelines.storage.base import AccessError, MissingFileError, StorageError

ATTEMPTS = 8  # of one request, by botocore; and of one transfer whose answers break off
CONNECTIONS = 32
_NOT_THERE = {"NoSuchKey", "404"}
WITHOUT_CHECKSUMS = "when_required"  # a value of AWS_REQUEST_CHECKSUM_CALCULATION
NO_CONDITION, NO_CHECKSUMS = "If-None-Match", "x-amz-checksum"  # headers that a service may not know
_DAMAGED = {"BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}  # on its way to the service


@dataclass(frozen=True, kw_only=True)
class S3Config:
    """How a bucket is accessed. Null values take AWS's environment variables and configuration files."""

    endpoint_url: str | None = None
    """URL of an S3 service, such as http://localhost:9000. It contains no credentials."""
    region: str | None = None
    """Region of the bucket. Null takes AWS_REGION, then AWS_DEFAULT_REGION."""
    anonymous: bool = False
    """Do not sign requests, for public buckets."""
    path_style: bool = False
    """Put the bucket into the path of a URL instead of the host name. Some services need it."""

    def __post_init__(self) -> None:
        if self.endpoint_url is not None and "@" in self.endpoint_url:
            raise StorageError(
                "an S3 endpoint_url must not hold a user or password; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if self.endpoint_url is not None and not self.endpoint_url.startswith(("http://", "https://")):
            raise StorageError(f"the S3 endpoint_url {self.endpoint_url!r} does not begin with http:// or https://")


_client_lock = threading.Lock()


def client_of(config: S3Config, checksums: str | None = None) -> Any:
    """The one client of this process for a configuration. Threads may share clients, unlike boto3's sessions.

    checksums: in place of AWS_REQUEST_CHECKSUM_CALCULATION.
    """
    with _client_lock:
        return _open_client(config, os.getpid(), checksums)


@cache
def _open_client(config: S3Config, process: int, checksums: str | None) -> Any:
    """process: a forked process must not share its parent's connections."""
    import boto3
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    session = botocore.session.get_session()
    checksums = checksums or session.get_config_variable("request_checksum_calculation")
    options = Config(
        signature_version=UNSIGNED if config.anonymous else None,
        s3={"addressing_style": "path"} if config.path_style else None,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        request_checksum_calculation=checksums,
        # A service that does not know checksums sends none.
        response_checksum_validation=checksums if checksums == WITHOUT_CHECKSUMS else None,
    )
    region = config.region or os.environ.get("AWS_REGION") or None
    client = boto3.session.Session(botocore_session=session).client(
        "s3", endpoint_url=config.endpoint_url, region_name=region, config=options
    )
    client.meta.events.register("needs-retry.s3", _retry_if_damaged)
    client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
    return client


def _retry_if_damaged(response: Any, attempts: int, **_: Any) -> float | None:
    """Seconds until the next attempt, which botocore makes only of requests that fail in other ways; None for no attempt."""
    code = response[1].get("Error", {}).get("Code") if response else None
    return pause_before(attempts) if code in _DAMAGED and attempts < ATTEMPTS else None


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    """S3 takes Content-MD5 in place of x-amz-checksum headers. Some services require it, and do not know the others."""
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()
    params["context"].pop("checksum", None)


def pause_before(attempts: int) -> float:
    return random.uniform(0, min(0.05 * 2**attempts, 5))


def knows_checksums(config: S3Config) -> bool:
    """Whether requests may have x-amz-checksum headers. AWS_REQUEST_CHECKSUM_CALCULATION=when_required excludes them."""
    return bool(client_of(config).meta.config.request_checksum_calculation != WITHOUT_CHECKSUMS)


def is_checked(answer: Any) -> bool:
    """Whether botocore compares the body of an answer with a checksum of the whole object, and raises an error if it differs."""
    from botocore.httpchecksum import StreamingChecksumBody

    return isinstance(answer["Body"], StreamingChecksumBody)


def error_code(error: Any) -> str:
    """S3's name of an error, such as "NoSuchKey"; for a request without a body, the HTTP status: "404". Else empty."""
    return str((getattr(error, "response", None) or {}).get("Error", {}).get("Code", ""))


def broken_transfers() -> tuple[type[Exception], ...]:
    """Exceptions for an answer that begins well and breaks off."""
    from botocore import exceptions as boto
    from urllib3.exceptions import HTTPError

    return boto.IncompleteReadError, boto.HTTPClientError, boto.FlexibleChecksumError, HTTPError


def may_have_happened(error: Exception) -> bool:
    """Whether a write may have happened in spite of the error: no answer, a failure of the server, or "taken"."""
    from botocore.exceptions import ClientError, HTTPClientError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return is_conflict(error) or (status >= 500 and status != 501)
    return isinstance(error, HTTPClientError)


def is_conflict(error: Exception) -> bool:
    """Whether a write met another write. NoSuchUpload: its own completion may have succeeded, and the answer was lost.

    An error whose body is cut off has its HTTP status for a code.
    """
    return error_code(error) in {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchUpload"}


def is_unknown(code: str) -> bool:
    """Whether a service does not know a header of a request."""
    return code in {"NotImplemented", "501"}


@contextmanager
def explained(config: S3Config, action: str, place: str) -> Iterator[None]:
    """Turn boto3's errors into sentences. action: list, read, write or delete.   place: the URI of the file or folder."""
    from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        code = error_code(error)
        kind = MissingFileError if code in _NOT_THERE else StorageError if code == "NoSuchBucket" else AccessError
        raise kind(refusal(code, action, place, config)) from error
    except (BotoCoreError, HTTPError) as error:
        kind = StorageError if isinstance(error, ParamValidationError) else AccessError
        raise kind(f"{place} {_failure(error, action, config)}") from error


_REFUSALS = {  # codes of S3 -> what they mean and what to do
    "NoSuchKey 404": "does not exist; correct the URI",
    "NoSuchBucket": "cannot be found: {endpoint} has no such bucket; create it, or correct the URI",
    "AccessDenied AllAccessDisabled Forbidden 403 401": (
        "{or_missing}may not be accessed: no permission to {action} it ({right} on bucket {bucket}, {who}); "
        "ask its owner or use others"
    ),
    "InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken InvalidToken TokenRefreshRequired InvalidSecurity": (
        "cannot be accessed: {endpoint} refuses the credentials ({code}); renew or correct them"
    ),
    "RequestTimeTooSkewed": "cannot be accessed: this machine's clock is wrong, according to {endpoint}; set it",
    "PermanentRedirect 301 AuthorizationHeaderMalformed": (
        "cannot be accessed: its bucket is not in the region {region}; set the region, or AWS_REGION"
    ),
    "PreconditionFailed 412": "changed while it was being read; run again",
    NO_CONDITION: "cannot be written: {endpoint} cannot write a name only if it is free ({code}); use another store",
    NO_CHECKSUMS: (
        "cannot be accessed: {endpoint} does not know checksums ({code} headers); "
        "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
    ),
    " ".join(_DAMAGED): "cannot be written: what {endpoint} receives is damaged ({code}), each time; check it and the network",
}
_RIGHTS = {"list": "s3:ListBucket", "read": "s3:GetObject", "write": "s3:PutObject", "delete": "s3:DeleteObject"}


def refusal(code: str, action: str, place: str, config: S3Config) -> str:
    """What an error code of the service means for an action on a place. Arguments: as for explained."""
    if is_unknown(code):  # a header, of which only these are new
        code = NO_CONDITION if action == "write" else NO_CHECKSUMS if action == "read" and knows_checksums(config) else code
    template = "cannot be accessed: {endpoint} refuses to {action} it ({code})"
    for codes, sentence in _REFUSALS.items():
        if code in codes.split():
            template = sentence
    who = "requests are not signed" if config.anonymous else "with the credentials in use"
    region = client_of(config).meta.region_name or "asked for"
    meaning = template.format(
        code=code or "no code",
        action=action,
        or_missing="does not exist or " if action in ("list", "read") else "",
        right=_RIGHTS[action],
        bucket=place.split("/")[2],
        who=who,
        region=region,
        endpoint=_endpoint(config),
    )
    return f"{place} {meaning}"


def _failure(error: Exception, action: str, config: S3Config) -> str:
    """The meaning of a missing answer. Messages of botocore are not repeated: some hold parts of requests."""
    from botocore import exceptions as boto

    kind = type(error).__name__
    match error:
        case boto.SSLError():
            reason = f"the certificate of {_endpoint(config)} is not trusted; set AWS_CA_BUNDLE, or correct the endpoint's URL"
        case boto.NoCredentialsError() | boto.PartialCredentialsError():
            reason = (
                "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or read anonymously"
            )
        case boto.ProfileNotFound():
            reason = "AWS_PROFILE names a profile that no configuration file of AWS has; correct it"
        case boto.ParamValidationError():
            reason = "the name of the bucket or of the file is not one that S3 allows; correct the URI"
        case boto.IncompleteReadError() | boto.ResponseStreamingError() | boto.FlexibleChecksumError():
            reason = f"{_endpoint(config)} answers, but what arrives is cut off or damaged ({kind}); check it and the network"
        case boto.HTTPClientError() | boto.ConnectionError():
            reason = f"{_endpoint(config)} does not answer ({kind}); check the endpoint's URL and the network"
        case _:
            reason = f"no request can be made ({kind}); check the configuration of AWS"
    return f"cannot be {({'list': 'listed', 'write': 'written', 'delete': 'deleted'}).get(action, action)}: {reason}"


def _endpoint(config: S3Config) -> str:
    url = urlsplit(client_of(config).meta.endpoint_url)  # given by the environment, it may hold a password
    return f"{url.scheme}://{url.hostname}" + (f":{url.port}" if url.port else "")
