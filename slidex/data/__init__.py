"""Formats in, one memory-mapped CSR layout on disk, batches out."""

from slidex.data.csr import CsrArrays
from slidex.data.dataset import Dataset, NameList, Split
from slidex.data.matrices import prepare_npz
from slidex.data.splitting import SPLIT_NAMES, Progress, split_of_rows
from slidex.data.svmlight import prepare_svmlight, prepare_xmc
from slidex.data.writer import DatasetWriter

__all__ = [
    "SPLIT_NAMES",
    "CsrArrays",
    "Dataset",
    "DatasetWriter",
    "NameList",
    "Progress",
    "Split",
    "prepare_npz",
    "prepare_svmlight",
    "prepare_xmc",
    "split_of_rows",
]
