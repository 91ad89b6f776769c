"""infra/s3/create_bucket.py: where the bucket is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import S3Endpoint

SCRIPT = Path(__file__).parents[3] / "infra" / "s3" / "create_bucket.py"


@pytest.mark.parametrize(
    ("variables", "region"),
    [
        ({"AWS_REGION": "eu-central-1", "AWS_DEFAULT_REGION": "eu-west-1"}, "eu-central-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, "eu-west-1"),
        ({"AWS_REGION": "us-east-1"}, None),  # S3 refuses its name there
    ],
)
def test_a_bucket_is_made_in_the_region_that_the_store_reads_it_in(
    s3_endpoint: S3Endpoint, variables: dict[str, str], region: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("AWS_REGION", "AWS_DEFAULT_REGION")}
    name = f"region-{len(s3_endpoint.requests)}"
    done = subprocess.run(
        [sys.executable, SCRIPT, name],
        env=environment | {"AWS_ENDPOINT_URL": s3_endpoint.url} | variables,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name} was created\n", "")
    assert s3_endpoint.boto.get_bucket_location(Bucket=name)["LocationConstraint"] == region
