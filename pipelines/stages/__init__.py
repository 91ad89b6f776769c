"""One stage per file, with everything that is specific to it. Stages never import each other; they exchange artifacts.

dataset         an index of a dataset
tokenizer       a VQGAN, trained or imported
token_map       codes of every image
captions        features of captions
reference       features of real images, with which samples are compared
reconstruction  how well the tokenizer reproduces images
audit           duplicates in a token map
train           a generator
generate        samples of it
memorization    samples that are copies of images of the token map
image_set       images of other generators
evaluate        scores
report          one page on a run
"""
