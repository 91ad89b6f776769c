"""Folders and buckets, and what a machine keeps of them.

base       the interface of a folder of files, digests, errors
local      a folder of a file system
s3         a folder of a bucket
filesystem a folder of another service, through fsspec, for reading
ranges     a file over reads of ranges
s3_client  the client of an object store; the only module that imports boto3
open       opening a path or URI as a folder
cache      fetched files, and digests of files that were hashed before
external   weights and folders by path, s3://, hf://, https:// or another address
web        single files over https
atomic     writing local files in one step
redaction  URIs without passwords
"""
