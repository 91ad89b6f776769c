"""Makes a bucket for artifacts and gives it its settings. Does nothing twice: run it again after changing a file.

    python infra/s3/create_bucket.py enat --versioning --lifecycle infra/s3/lifecycle.json --policy infra/s3/bucket-policy.json

The endpoint and the credentials, which need the right to administrate buckets, come from boto3's usual variables.
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
    parser = argparse.ArgumentParser(description="Make a bucket for artifacts and give it its settings.")
    parser.add_argument("bucket")
    parser.add_argument("--versioning", action="store_true", help="what is deleted can be had back until the lifecycle ends it")
    parser.add_argument("--lifecycle", type=Path, metavar="FILE", help="rules, as in lifecycle.json")
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help="of the bucket, as in bucket-policy.json; BUCKET stands for its name"
    )
    options = parser.parse_args()
    region = os.environ.get("AWS_REGION") or None  # as for the store; botocore by itself knows AWS_DEFAULT_REGION alone
    try:
        done = create(boto3.client("s3", region_name=region), options.bucket, options.versioning, options.lifecycle, options.policy)
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"{options.bucket} cannot be set up: {error}")
    sys.stdout.write("".join(f"{line}\n" for line in done))


def create(client: Any, bucket: str, is_versioned: bool, lifecycle: Path | None, policy: Path | None) -> list[str]:
    """What was done, one line each."""
    done = [f"{bucket} is {'made' if _make(client, bucket) else 'there'}"]
    if is_versioned:
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        done.append("versions are kept")
    if lifecycle is not None:
        client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=json.loads(lifecycle.read_text()))
        done.append(f"lifecycle as in {lifecycle}")
    if policy is not None:
        client.put_bucket_policy(Bucket=bucket, Policy=policy.read_text().replace("BUCKET", bucket))
        done.append(f"policy as in {policy}")
    return done


def _make(client: Any, bucket: str) -> bool:
    """Whether it was made; else it was there, and ours."""
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
