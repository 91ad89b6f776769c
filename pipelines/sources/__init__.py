"""Datasets as they lie about: ImageNet and COCO in their usual layouts, on a file system or in a bucket.

A source says what there is (`scan`) and gives its bytes (`read`). What was found is kept as an index, one row per image, which
fixes the order that everything later goes by; `dataset.Dataset` reads a dataset through its index.
"""

from pipelines.sources.base import Entry, Findings, Source
from pipelines.sources.config import DatasetConfig, open_source

__all__ = ["DatasetConfig", "Entry", "Findings", "Source", "open_source"]
