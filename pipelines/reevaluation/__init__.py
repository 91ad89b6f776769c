"""Registered models evaluated again.

plan        how a registered model is evaluated now
reevaluate  which models are due, and evaluating them
drift       whether scores moved
report      the answer for people and programs
"""
