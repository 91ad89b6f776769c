"""What stages read and store: images, codes, captions, samples.

sources/    layouts of datasets
dataset     a dataset through its index
image_sets  images of other generators
token_map   codes of all images of a dataset, in memory or as memory-mapped files
captions    features of captions
samples     samples and the seeds, labels and cost of each
labels      how labels of samples were chosen
inspection  a look at what an artifact holds
"""
