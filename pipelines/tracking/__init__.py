"""MLflow. No code outside this folder imports it.

run       runs: parameters, metrics, files
search    reading runs and registered models
registry  registering models
models    checkpoints, as MLflow lists them beside runs
client    clients of MLflow
errors    why a server cannot be used
"""
