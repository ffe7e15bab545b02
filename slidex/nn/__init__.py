"""The model's parts as torch modules: the large-output head with its loss, encoder, and the choice of active classes.

`LSHSoftmaxLoss` and `SamplingOptions` are for models of your own; they load their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slidex.nn import functional
    from slidex.nn.clipping import clip_grad_norm_
    from slidex.nn.options import SamplingOptions
    from slidex.nn.sampling import Sampling, SamplingStats
    from slidex.nn.softmax_loss import LSHSoftmaxLoss, TopK

__all__ = [
    "LSHSoftmaxLoss",
    "Sampling",
    "SamplingOptions",
    "SamplingStats",
    "TopK",
    "clip_grad_norm_",
    "functional",
]

_HOME = {
    "LSHSoftmaxLoss": "slidex.nn.softmax_loss",
    "Sampling": "slidex.nn.sampling",
    "SamplingOptions": "slidex.nn.options",
    "SamplingStats": "slidex.nn.sampling",
    "TopK": "slidex.nn.softmax_loss",
    "clip_grad_norm_": "slidex.nn.clipping",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "functional":
        return importlib.import_module("slidex.nn.functional")
    raise AttributeError(f"module 'slidex.nn' has no attribute {name!r}")
