"""Pages that need no network, and their charts.

chart   a small description of a chart, as a figure of Plotly and as a PNG
page    one HTML file from a template, with charts, sortable tables and pictures that enlarge on click
"""
