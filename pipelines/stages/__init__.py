"""One stage per file, with everything that is known of it. Stages never import each other; they exchange artifacts.

dataset         an index of a dataset
tokenizer       a VQGAN, trained or imported
token_map       codes of every image
captions        features of captions
reference       what samples are compared with
reconstruction  how well the tokenizer keeps images
train           a generator
generate        samples of it
image_set       images of other generators
evaluate        scores
report          one page on a run
"""
