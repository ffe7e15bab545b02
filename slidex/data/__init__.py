"""Formats in, one memory-mapped CSR layout on disk, batches out."""

from slidex.data.csr import CsrArrays
from slidex.data.dataset import Dataset, NameList, Split
from slidex.data.matrices import prepare_npz
from slidex.data.python_source import prepare_python_source, standard_library_directory
from slidex.data.splitting import SPLIT_NAMES, Progress, split_of_rows
from slidex.data.svmlight import prepare_svmlight, prepare_xmc, read_xmc_rows
from slidex.data.text import prepare_csv, prepare_jsonl, read_jsonl_texts
from slidex.data.vectorizers import Vectorizer, load_vectorizer
from slidex.data.writer import DatasetWriter

__all__ = [
    "SPLIT_NAMES",
    "CsrArrays",
    "Dataset",
    "DatasetWriter",
    "NameList",
    "Progress",
    "Split",
    "Vectorizer",
    "load_vectorizer",
    "prepare_csv",
    "prepare_jsonl",
    "prepare_npz",
    "prepare_python_source",
    "prepare_svmlight",
    "prepare_xmc",
    "read_jsonl_texts",
    "read_xmc_rows",
    "split_of_rows",
    "standard_library_directory",
]
