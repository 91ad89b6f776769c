"""Evaluations in MLflow, compared with each other and with published results.

query      evaluations from MLflow
sections   rows that were measured in the same way
significance  differences that are larger than their errors
published  published numbers, from published.yaml
columns    the columns of a table and its cells; sentences: the words around it
charts     score against cost, and sweeps;  curves: scores while training
table      the tables for a terminal, CSV and JSON; page: the HTML page
compare    one comparison from the command to its answer
"""
