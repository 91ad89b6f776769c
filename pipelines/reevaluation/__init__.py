"""Evaluating registered models again.

plan        the stages that evaluate a registered model, and the artifacts that they read
reevaluate  finds the models that are due and evaluates them
drift       whether scores changed
report      the answer as a table and as JSON
"""
