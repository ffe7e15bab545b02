"""The kernels in Numba for CPUs: same names and signatures as `slidex.kernels.reference`."""

from slidex.kernels.cpu.best_classes import best_classes
from slidex.kernels.cpu.embedding import embedding_bag, embedding_bag_update
from slidex.kernels.cpu.linear import linear_fit
from slidex.kernels.cpu.linear_scoring import linear_scores
from slidex.kernels.cpu.losses import logistic_loss, shared_logistic_loss, shared_softmax_loss, softmax_loss
from slidex.kernels.cpu.neighbors import inverted_index, nearest_rows, neighbor_classes
from slidex.kernels.cpu.pairs import pair_hidden_grad, pair_logits, pair_update
from slidex.kernels.cpu.shared import gather_rows, rows_update

__all__ = [
    "best_classes",
    "embedding_bag",
    "embedding_bag_update",
    "gather_rows",
    "inverted_index",
    "linear_fit",
    "linear_scores",
    "logistic_loss",
    "nearest_rows",
    "neighbor_classes",
    "pair_hidden_grad",
    "pair_logits",
    "pair_update",
    "rows_update",
    "shared_logistic_loss",
    "shared_softmax_loss",
    "softmax_loss",
]
