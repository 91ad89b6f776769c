"""The `enat` command: each command or group has its own file.

main       the group of commands, exit codes, signals
options    arguments, options and output that commands share
run, plan, submit, config, jobs, sample, evaluate, compare, reevaluate, import_weights, artifacts, doctor
"""
