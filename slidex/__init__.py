"""slidex: classifiers with very many classes, computed on the classes that matter.

The public names load their modules on first use, so that ``import slidex`` and ``slidex --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slidex import errors

if TYPE_CHECKING:
    from slidex.data import Dataset
    from slidex.sklearn import SlidexClassifier
    from slidex.train.config import TrainConfig
    from slidex.train.evaluate import evaluate
    from slidex.train.loop import fit
    from slidex.train.predict import predict
    from slidex.train.run import Run

__version__ = "0.1.0"
__all__ = [
    "Dataset",
    "Run",
    "SlidexClassifier",
    "TrainConfig",
    "__version__",
    "errors",
    "evaluate",
    "fit",
    "predict",
]

_HOME = {
    "Dataset": "slidex.data",
    "Run": "slidex.train.run",
    "SlidexClassifier": "slidex.sklearn",
    "TrainConfig": "slidex.train.config",
    "evaluate": "slidex.train.evaluate",
    "fit": "slidex.train.loop",
    "predict": "slidex.train.predict",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slidex' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
