"""What MLflow's registry says of a model.

model_card         its card, tags and name
evaluation_record  its last evaluation
influences         those of samples on scores, and errors of differences
"""
