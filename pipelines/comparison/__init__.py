"""Evaluations in MLflow, compared with each other and with published results.

query      evaluations from MLflow
sections   rows that were measured in the same way
published  published numbers, from published.yaml
columns    the columns of a table; sentences: the words around it; table: the table for a terminal
page       the HTML page; canvas, labels, cost_plot, sweep_plot: its figures
compare    one comparison from the command to its answer
"""
