"""Models that leave a store, and published weights that come into one.

export     a trained model as a folder or a repository of the Hugging Face hub, which enat.pipeline opens
hub_card   its card: licence, scores with their protocols, how to use it
known      where known weights are published (known.yaml)
"""
