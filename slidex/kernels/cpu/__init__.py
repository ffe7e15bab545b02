"""The kernels in Numba for CPUs: same names and signatures as `slidex.kernels.reference`."""

from slidex.kernels.cpu.embedding import embedding_bag, embedding_bag_adam
from slidex.kernels.cpu.losses import logistic_loss, shared_logistic_loss, shared_softmax_loss, softmax_loss
from slidex.kernels.cpu.pairs import pair_adam, pair_hidden_grad, pair_logits
from slidex.kernels.cpu.shared import gather_rows, rows_adam

__all__ = [
    "embedding_bag",
    "embedding_bag_adam",
    "gather_rows",
    "logistic_loss",
    "pair_adam",
    "pair_hidden_grad",
    "pair_logits",
    "rows_adam",
    "shared_logistic_loss",
    "shared_softmax_loss",
    "softmax_loss",
]
