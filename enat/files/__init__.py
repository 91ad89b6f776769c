"""Models as files, whatever the architecture.

weights    state dicts from files, and tensors into modules
hub        a model as a folder or a repository of the Hugging Face hub (imports no torch)
"""
