"""Create a bucket for artifacts and apply its settings. To apply changed files, run it again.

    python infra/s3/create_bucket.py enat --versioning --lifecycle infra/s3/lifecycle.json --policy infra/s3/bucket-policy.json

The endpoint and the credentials come from boto3's usual variables. The credentials need the right to administer buckets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def main() -> None:
    parser = argparse.ArgumentParser(description="Create a bucket for artifacts and apply its settings.")
    parser.add_argument("bucket")
    parser.add_argument("--versioning", action="store_true", help="keep deleted objects until the lifecycle expires them")
    parser.add_argument("--lifecycle", type=Path, metavar="FILE", help="lifecycle rules, such as lifecycle.json")
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help="a bucket policy, such as bucket-policy.json; BUCKET is replaced by the name"
    )
    options = parser.parse_args()
    region = os.environ.get("AWS_REGION") or None  # as for the store; botocore itself reads only AWS_DEFAULT_REGION
    try:
        done = create(boto3.client("s3", region_name=region), options.bucket, options.versioning, options.lifecycle, options.policy)
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"{options.bucket} cannot be set up: {error}")
    sys.stdout.write("".join(f"{line}\n" for line in done))


def create(client: Any, bucket: str, is_versioned: bool, lifecycle: Path | None, policy: Path | None) -> list[str]:
    """Create the bucket if necessary and apply the settings. Returns one line for each action."""
    done = [f"{bucket} {'was created' if _make(client, bucket) else 'exists'}"]
    if is_versioned:
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        done.append("versioning is enabled")
    if lifecycle is not None:
        client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=json.loads(lifecycle.read_text()))
        done.append(f"lifecycle from {lifecycle}")
    if policy is not None:
        client.put_bucket_policy(Bucket=bucket, Policy=policy.read_text().replace("BUCKET", bucket))
        done.append(f"policy from {policy}")
    return done


def _make(client: Any, bucket: str) -> bool:
    """Create the bucket. Returns False if it already exists and is ours."""
    try:
        client.head_bucket(Bucket=bucket)
        return False
    except ClientError as error:
        if error.response["Error"]["Code"] not in {"404", "NoSuchBucket"}:
            raise
    region = client.meta.region_name
    where = {} if region in {None, "us-east-1", "aws-global"} else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    client.create_bucket(Bucket=bucket, **where)
    return True


if __name__ == "__main__":
    main()
