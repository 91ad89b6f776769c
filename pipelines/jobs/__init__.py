"""Run a config as a job of a Ray cluster.

submission   what is sent, and checks before anything starts
credentials  checks that no secret is sent with a job
places       checks that the cluster can see what a config names
client       jobs of a cluster: list, follow, stop
progress     the stages that a job computes now
"""
