"""Folders and buckets, and what a machine keeps of them.

base       a folder of files, digests
local      a folder of a file system
s3         a folder of a bucket; s3_client: the only module that imports boto3
open       a URI as a folder
cache      files fetched from elsewhere, and digests of files that were hashed before
external   weights and folders by path, s3:// or hf://
atomic     writing files in one step
redaction  URIs without passwords
"""
