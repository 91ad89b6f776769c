"""Artifacts: what a stage made, found again by what went into it.

manifest      what an artifact is, and the other small records of a store
store         reading and writing artifacts in a folder of any kind
open          opening a path or URI as a store
inventory     listing what a store holds
lineage       what an artifact was made from, and what was made from it
transfer      copying artifacts between stores
verification  reading every byte again
garbage       removing what is no longer needed
last_used     recording which artifacts runs use
lease         of identical runs at once, one works
"""
