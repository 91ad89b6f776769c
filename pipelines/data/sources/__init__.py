"""Datasets as they lie about: ImageNet and COCO in their usual layouts, on a file system or in a bucket.

A source says what there is (`scan`) and gives its bytes (`read`). What was found is kept as an index, one row per image, which
fixes the order that everything later goes by; `dataset.Dataset` reads a dataset through its index.

base     a source, its entries and findings
config   a dataset in a config, and opening its source
folders  image folders; tar: WebDataset shards; parquet: tables of images; coco: MS-COCO; digits: scikit-learn's digits
"""

from pipelines.data.sources.base import Entry, Findings, Source
from pipelines.data.sources.config import DatasetConfig, open_source

__all__ = ["DatasetConfig", "Entry", "Findings", "Source", "open_source"]
