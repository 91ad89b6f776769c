"""A separate S3 endpoint for these tests, in its own process. It does not share buckets with the endpoint of tests/pipelines."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from workstation import s3_process


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Its URL."""
    with s3_process() as url:
        yield url


@pytest.fixture
def s3_environment(s3_server: str) -> dict[str, str]:
    """The environment of a command that must use this endpoint and no other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return kept | {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
