"""The kernels in Numba for NVIDIA GPUs: same names and signatures as `slidex.kernels.reference`.

They compute in float32 on weights, hidden vectors, scores and gradients of float32, bfloat16 or float16, on torch's
current stream, without a copy, an atomic addition or a wait for the device. They are imported when first asked for, so
that `slidex.kernels.cuda.environment` can say what is missing where they cannot be.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "embedding_bag": "embedding",
    "embedding_bag_update": "embedding",
    "gather_rows": "shared",
    "logistic_loss": "losses",
    "pair_hidden_grad": "pairs",
    "pair_logits": "pairs",
    "pair_update": "pairs",
    "rows_update": "shared",
    "shared_logistic_loss": "losses",
    "shared_softmax_loss": "losses",
    "softmax_loss": "losses",
}


def __getattr__(name: str) -> Any:
    """A kernel, from its module; MissingExtraError where numba-cuda is not what it must be."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
