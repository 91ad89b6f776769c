"""Ray: connecting to a cluster, and checking its capacity.

connection   start Ray on this machine, or connect to a cluster
resources    how a stage is distributed over workers
capacity     whether a cluster has room for a run
data_stream  Ray Data jobs that survive lost workers
device       names and memory of devices
"""
