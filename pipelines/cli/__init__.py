"""The `enat` command, one command or group a file.

main       the command itself: exit codes, signals
options    options that commands share
run, plan, submit, jobs, sample, evaluate, compare, reevaluate, import_weights, artifacts, doctor
"""
