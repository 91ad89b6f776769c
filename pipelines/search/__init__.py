"""The search for the sampler of a trained model, as far as it needs no stages: what is tried next, what is kept, what is shown.

config   the `search` section of a config
space    the samplers of a search, as numbers that Optuna proposes
study    proposals and their scores in Optuna's storage, a file that outlives the process
halving  numbers of samples, and which samplers are worth more of them
front    samplers that no other one beats at their cost
page     the report;  summary: what the terminal shows
"""
