"""What stages read and store: images, codes, captions, samples.

sources/    layouts of datasets
dataset     a dataset read through its index
image_sets  images of other generators
token_map   codes of all images of a dataset, in memory or as memory-mapped files
captions    features of captions
samples     generated samples: seeds, labels, codes, cost
labels      how the labels of samples were chosen
inspection  the contents of an artifact, shown on the terminal and as pictures
"""
