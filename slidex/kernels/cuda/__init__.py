"""The kernels in Numba for NVIDIA GPUs: same names and signatures as `slidex.kernels.reference`.

They compute in float32 on weights, hidden vectors, scores and gradients of float32, bfloat16 or float16, on torch's
current stream, without a copy, an atomic addition or a wait for the device.
"""

from slidex.kernels.cuda.embedding import embedding_bag, embedding_bag_update
from slidex.kernels.cuda.losses import logistic_loss, shared_logistic_loss, shared_softmax_loss, softmax_loss
from slidex.kernels.cuda.pairs import pair_hidden_grad, pair_logits, pair_update
from slidex.kernels.cuda.shared import gather_rows, rows_update

__all__ = [
    "embedding_bag",
    "embedding_bag_update",
    "gather_rows",
    "logistic_loss",
    "pair_hidden_grad",
    "pair_logits",
    "pair_update",
    "rows_update",
    "shared_logistic_loss",
    "shared_softmax_loss",
    "softmax_loss",
]
