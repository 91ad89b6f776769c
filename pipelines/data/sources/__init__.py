"""Layouts of datasets: ImageNet and COCO as they are distributed, on a file system or in a bucket.

A source lists its images (`scan`) and reads their bytes (`read`). The list is stored as an index with one row per image, which
fixes the order of the dataset; `dataset.Dataset` reads a dataset through its index.

base     the interface of a source, its entries and findings
names    which files belong to a dataset, and to which split
config   DatasetConfig, and opening its source
folders  folders of classes; tar: WebDataset shards; parquet: tables of images; coco: MS-COCO; digits: scikit-learn's digits
"""

from pipelines.data.sources.base import Entry, Findings, Source
from pipelines.data.sources.config import DatasetConfig, open_source

__all__ = ["DatasetConfig", "Entry", "Findings", "Source", "open_source"]
