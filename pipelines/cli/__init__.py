"""The `enat` command.

main            the group of commands, exit codes, signals
options         arguments, options and output that commands share
run             plan, run, evaluate
jobs            submit, jobs
config          init, config
sharing         import, export
sample, search, compare, reevaluate, artifacts, doctor
                a command of that name
"""
