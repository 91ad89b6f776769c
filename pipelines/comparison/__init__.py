"""Evaluations of MLflow side by side with what others published.

query      evaluations from MLflow
sections   what is measured in the same way stands together
published  published numbers, from published.yaml
columns    the columns of a table; sentences: the words around it; table: the table for a terminal
page       the HTML page; canvas, labels, cost_plot, sweep_plot: its figures
compare    one comparison from the command to its answer
"""
