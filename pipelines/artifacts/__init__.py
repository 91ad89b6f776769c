"""Artifacts: what a stage made, found again by what went into it.

manifest      what an artifact is, and the other small records of a store
store         reading and writing artifacts; local_store, s3_store: in a folder, in a bucket
open          a URI as a store
inventory     what a store holds
lineage       what an artifact was made from, and what was made from it
transfer      copying artifacts between stores
verification  reading every byte again
garbage       removing what nobody needs; last_used: which artifacts runs have asked for
"""
