"""Ray: connecting to a cluster, and what it has room for.

connection   starting Ray here or connecting to a cluster
resources    how a stage is spread over workers
capacity     whether a cluster has room for a run
data_stream  Ray Data jobs with results in order
device       names, precision and memory of devices
"""
