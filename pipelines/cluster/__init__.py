"""Ray: connecting to a cluster, and checking its capacity.

connection   start Ray on this machine, or connect to a cluster
local        a cluster on this machine: start, loss, end
lean         what such a cluster does without
supervisor   a command in a child process, and its loss of the cluster
reaper       ends what outlives a killed command
resources    how a stage is distributed over workers
capacity     whether a cluster has room for a run
data_stream  Ray Data jobs that survive lost workers
hardware     names of CPUs and GPUs, peaks of known GPUs
device       names and memory of devices
tasks        Ray's, or calls in this process where a run does without Ray
waiting      for results of Ray, in any thread
process      which process of which machine this is
"""
