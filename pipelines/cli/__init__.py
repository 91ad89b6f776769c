"""The `enat` command.

main            the group of commands, exit codes, signals
options         arguments, options and output that commands share
run             plan, run, evaluate
jobs            submit, jobs
init, sample, search, compare, reevaluate, import_weights, export, artifacts, config, doctor
                a command of that name (import_weights: import)
"""
