"""How the labels of samples were chosen, in words that are the same for samples of this store and for those of other generators.

The words say what the samples are, not how they came about: "1000 classes, 50 each", of a model that was asked for each class in
turn and of somebody's .npz with such labels. Equal words mean as many samples of each class, and they stand in every protocol.
Labels that were drawn at random, as many generators do it, are "about 50 each": what is measured of them is not quite the same.

Shape legend: N samples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pipelines.artifacts.manifest import Manifest
from pipelines.storage.base import digest_of

UNKNOWN = "unknown"
NO_LABELS = "none"  # of generators that know no classes
ROWS = "token map rows"  # real codes to begin with, and the label of their image
_CHOICES = {"drawn": "drawn", "in_order": "in order"}  # of captions; GenerateConfig.caption_choice
_CLASSES = re.compile(r"(\d{1,6}) classes(, drawn)?")
_FARTHEST = 5.0  # standard deviations of chi-square that counts of evenly drawn labels stay within
_CAPTIONS = re.compile(rf"captions of [^,]+, ({'|'.join(_CHOICES.values())})")
STATED = (
    f'"1000 classes" (as many images of each), "1000 classes, drawn" (at random), "{NO_LABELS}" (no classes), '
    f'"captions of NAME, drawn" (or "in order"; NAME of the dataset) or "{UNKNOWN}"'
)


def scheme_of_labels(labels: np.ndarray | Sequence[int]) -> str:
    """labels: integers (N,), N above 0; below 0 where one is not known."""
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    if classes[0] < 0:
        return UNKNOWN
    if len(classes) == 1:
        return f"class {classes[0]} alone"
    if int(classes[-1]) == len(classes) - 1:  # all of them, from 0 on
        mean, spread = counts.mean(), float(np.sqrt(2 * (len(classes) - 1)))
        if (counts == mean).all() or np.square(counts - mean).sum() / mean < len(classes) - 1 + _FARTHEST * spread:
            return _evenly(len(classes), int(counts.sum()), is_exact=bool((counts == mean).all()))
    digest = digest_of([classes.tolist(), counts.tolist()])[:8]  # which they are, and how often each
    return f"{len(classes)} classes given ({digest})"


def _evenly(num_classes: int, num_samples: int, *, is_exact: bool) -> str:
    return f"{num_classes} classes, {'' if is_exact else 'about '}{round(num_samples / num_classes)} each"


def stated_scheme(text: str, num_images: int) -> str:
    """Of images that come without labels, by what whoever has them says of them. Raises ValueError where that cannot be."""
    check_stated(text)
    if (found := _CLASSES.fullmatch(text)) is None:
        return text
    num_classes, is_exact = int(found[1]), found[2] is None
    if not 2 <= num_classes <= num_images or (is_exact and num_images % num_classes):
        raise ValueError(f"labels are said to be {text}, but {num_images} images are not as many of each")
    return _evenly(num_classes, num_images, is_exact=is_exact)


def check_stated(text: str) -> None:
    """Raises ValueError for other words than STATED."""
    if text not in (NO_LABELS, UNKNOWN) and not _CLASSES.fullmatch(text) and not _CAPTIONS.fullmatch(text):
        raise ValueError(f"labels are said to be {text!r}; say {STATED}")


def scheme_of(samples: Manifest) -> str:
    """Of samples that stage `generate` made here, or images that stage `images` indexed."""
    if samples.stage == "images":
        return str(samples.summary["labels"])
    summary, config = samples.summary, samples.config
    asked_for, num_samples = summary["labels"], int(summary["num_samples"])
    if asked_for == "captions":
        dataset = config["dataset"]
        return f"captions of {dataset['name'] or dataset['kind']}, {_CHOICES[config['caption_choice']]}"
    if asked_for == ROWS:
        return f"{ROWS}, mask ratio {summary['mask_ratio']:g}"
    if asked_for == "given":
        return scheme_of_labels(np.resize(np.array(config["labels"]), num_samples))
    if asked_for == "each class in turn":
        return scheme_of_labels(np.arange(num_samples) % int(summary["num_classes"]))
    assert asked_for == NO_LABELS, asked_for
    return NO_LABELS
