"""A config as a job of a Ray cluster.

submission   what is sent, and what is refused before anything starts
credentials  no secret leaves with a job
client       jobs of a cluster: listing, following, stopping
"""
