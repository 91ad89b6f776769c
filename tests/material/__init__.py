"""What tests work on, each made where it is needed and always the same.

digits_run                       one run of the demo, which all tests share
layouts, hostile                 photographs in every layout of a dataset; image files that are broken or malicious
small_models, random_weights, tiny_clip   networks without published weights
tiny_training                    a token map of drawn codes, and ranks that train on it
compare_lab                      MLflow with finished runs
places                           a store in a folder and one in a bucket
summaries                        summaries of artifacts
"""
