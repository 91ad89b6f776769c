"""How the labels of samples were chosen, in words that are the same for this program's samples and for other generators'.

The words describe the samples, not how they were made: both a model that generates each class in turn and an .npz file with such
labels give "1000 classes, 50 each". Equal words mean equal numbers of samples per class. They are part of every protocol. Labels
drawn at random, as many generators do it, give "about 50 each", because scores of such samples differ slightly.

Shape legend: N samples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pipelines.storage.base import digest_of

UNKNOWN = "unknown"
NO_LABELS = "none"  # of generators without classes
ROWS = "token map rows"  # samples that begin with real codes, with the label of that image
CAPTION_CHOICES = {"drawn": "drawn", "in_order": "in order"}  # of captions; GenerateConfig.caption_choice
_CLASSES = re.compile(r"(\d{1,6}) classes(, drawn)?")
_MAX_DEVIATIONS = 5.0  # standard deviations of chi-square: counts of uniformly drawn labels stay within
_CAPTIONS = re.compile(rf"captions of [^,]+, ({'|'.join(CAPTION_CHOICES.values())})")
STATED = (
    f'"1000 classes" (equally many images each), "1000 classes, drawn" (at random), "{NO_LABELS}" (no classes), '
    f'"captions of NAME, drawn" (or "in order"; NAME is the dataset) or "{UNKNOWN}"'
)


def scheme_of_labels(labels: np.ndarray | Sequence[int]) -> str:
    """Describe labels: integers (N,) with N > 0; a negative label is unknown."""
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    if classes[0] < 0:
        return UNKNOWN
    if len(classes) == 1:
        return f"class {classes[0]} alone"
    if int(classes[-1]) == len(classes) - 1:  # all classes 0..C-1
        mean, deviation = counts.mean(), float(np.sqrt(2 * (len(classes) - 1)))
        if (counts == mean).all() or np.square(counts - mean).sum() / mean < len(classes) - 1 + _MAX_DEVIATIONS * deviation:
            return _evenly(len(classes), int(counts.sum()), is_exact=bool((counts == mean).all()))
    digest = digest_of([classes.tolist(), counts.tolist()])[:8]  # of the classes and their counts
    return f"{len(classes)} classes given ({digest})"


def _evenly(num_classes: int, num_samples: int, *, is_exact: bool) -> str:
    return f"{num_classes} classes, {'' if is_exact else 'about '}{round(num_samples / num_classes)} each"


def stated_scheme(text: str, num_images: int) -> str:
    """Describe images that come without labels by a statement about them. Raises ValueError if it cannot be true."""
    check_stated(text)
    if (found := _CLASSES.fullmatch(text)) is None:
        return text
    num_classes, is_exact = int(found[1]), found[2] is None
    if not 2 <= num_classes <= num_images or (is_exact and num_images % num_classes):
        raise ValueError(f"labels are stated as {text}, but {num_images} images cannot be split equally among the classes")
    return _evenly(num_classes, num_images, is_exact=is_exact)


def check_stated(text: str) -> None:
    """Raise ValueError unless the text is one of STATED."""
    if text not in (NO_LABELS, UNKNOWN) and not _CLASSES.fullmatch(text) and not _CAPTIONS.fullmatch(text):
        raise ValueError(f"labels are stated as {text!r}; choose one of {STATED}")
