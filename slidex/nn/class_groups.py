"""Groups of classes alike, each with a linear classifier of its own, which help to rank the classes in them.

Of a class with one training row a classifier knows that row and no more; what all classes of its kind have in common,
it does not. The classifier of their group has the rows of all of them: it is what one level of a label tree is (Prabhu
et al., WWW 2018), and as there a class's probability takes that of its group as a factor.

Legend: N rows, C classes, G groups, F features, D hidden width, A candidates per row, B groups per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from scipy.sparse import csr_matrix

from slidex.data.csr import CsrArrays
from slidex.kernels.arguments import check_part, refuse_part
from slidex.kernels.cpu import linear_scores

if TYPE_CHECKING:
    from slidex.kernels import LinearWeights

SHARPNESS, FACTOR = 4.0, 2.0
"""A score of 1, as of true rows, has a probability of 0.98, and its logarithm counts twice."""
_SAMPLE, _BATCH, _PASSES = 100_000, 4096, 10
"""Of k-means: classes drawn, how many at once, and how often each."""
_CLASSES_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class ClassGroups:
    """The groups of a layer's classes and their classifiers.

    Args:
        group_C: int32, in [0, G).
        weights: Of G classifiers over the F input features, for rows of unit L2 norm.

    Raises:
        ConfigError: A shape or dtype does not fit, or there is no such group.
    """

    group_C: torch.Tensor
    weights: LinearWeights

    def __post_init__(self) -> None:
        check_part("ClassGroups", "group_C", self.group_C, (torch.int32,), (len(self.group_C),))
        low, high = (int(i) for i in torch.aminmax(self.group_C)) if len(self.group_C) else (0, 0)
        if low < 0 or high >= max(self.num_groups, 1):
            refuse_part("ClassGroups", "group_C", f"groups in [0, {self.num_groups})", (low, high))

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.weights.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.group_C.nbytes + self.weights.nbytes

    def scores(
        self, x_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor], ids_NA: torch.Tensor
    ) -> torch.Tensor:
        """``2 log sigmoid(4 (w_g . x / |x| + b_g))`` of each class's group g: float32 (N, A), of no meaning at pads.

        Args:
            x_rows: Offsets, features and values of N rows of unit L2 norm.
            ids_NA: int64, classes, padded with -1.
        """
        groups_NB, place_NA = distinct_groups(self.group_C, ids_NA, ids_NA.shape[1])
        scores_NB = torch.nn.functional.logsigmoid(
            SHARPNESS * linear_scores(self.weights, *x_rows, groups_NB)
        )
        return FACTOR * scores_NB.gather(1, place_NA.long())


def group_classes(hidden_ND: torch.Tensor, labels: CsrArrays, num_groups: int, seed: int) -> torch.Tensor:
    """Groups of classes whose training rows look alike to the network: int32 (C,).

    Spherical k-means (Dhillon and Modha 2001; scikit-learn's with mini-batches), on a sample, of the classes' mean
    hidden vectors, all scaled to unit length. Groups need not be of one size, and some can be empty.

    Args:
        hidden_ND: float32, of the training rows.
        labels: True classes of these rows.
        num_groups: G; where fewer classes have a row, or are drawn, as many as these.
        seed: Of the sample, and of where k-means starts.
    """
    from sklearn.cluster import MiniBatchKMeans  # noqa: PLC0415  (takes a second to import)
    from threadpoolctl import threadpool_limits  # noqa: PLC0415

    normalize = torch.nn.functional.normalize
    ones = np.ones(labels.nnz, dtype=np.float32)
    rows_of_class = csr_matrix(
        (ones, labels.indices, labels.indptr), shape=(labels.num_rows, labels.num_columns)
    ).T.tocsr()
    hidden = normalize(hidden_ND).numpy()

    def means(part: slice | np.ndarray) -> torch.Tensor:
        return normalize(torch.from_numpy(rows_of_class[part] @ hidden))

    seen = np.flatnonzero(np.diff(rows_of_class.indptr))
    drawn = np.random.default_rng(seed).choice(seen, min(len(seen), _SAMPLE), replace=False)
    clusters = MiniBatchKMeans(
        min(num_groups, len(drawn)),
        init="random",
        n_init=1,
        max_iter=_PASSES,
        batch_size=_BATCH,
        random_state=seed,
        compute_labels=False,
    )
    with threadpool_limits(torch.get_num_threads()):
        clusters.fit(means(drawn).numpy())
    centers_GD = normalize(torch.from_numpy(clusters.cluster_centers_))
    group_C = torch.empty(labels.num_columns, dtype=torch.int32)
    for first in range(0, labels.num_columns, _CLASSES_AT_ONCE):
        part = slice(first, min(first + _CLASSES_AT_ONCE, labels.num_columns))
        group_C[part] = (means(part) @ centers_GD.T).argmax(1)
    return group_C


def group_labels(group_C: torch.Tensor, labels: CsrArrays, num_groups: int) -> CsrArrays:
    """The groups of each row's classes: N rows of G columns."""
    row_P = np.repeat(np.arange(labels.num_rows), np.diff(labels.indptr))
    row_Q, group_Q = np.divmod(np.unique(row_P * num_groups + group_C.numpy()[labels.indices]), num_groups)
    indptr = np.searchsorted(row_Q, np.arange(labels.num_rows + 1))
    return CsrArrays(indptr, group_Q.astype(np.int32), None, num_groups)


def distinct_groups(
    group_C: torch.Tensor, ids_NA: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The groups of each row's classes, each once, in the order of the classes.

    Args:
        group_C: int32.
        ids_NA: int32 or int64, classes, padded with -1.
        most: B; those of a row beyond so many are left out.

    Returns:
        int32 (N, B) groups, padded with -1, and int32 (N, A) the place among them of each class's group; 0 for pads and
        for groups left out.
    """
    groups_NB = torch.empty(len(ids_NA), most, dtype=torch.int32)
    place_NA = torch.zeros(ids_NA.shape, dtype=torch.int32)
    _distinct(group_C.numpy(), ids_NA.numpy(), groups_NB.numpy(), place_NA.numpy())
    return groups_NB, place_NA


@numba.njit(cache=True, nogil=True, parallel=True)
def _distinct(group_C, ids_NA, groups_NB, place_NA):
    most = groups_NB.shape[1]
    for n in numba.prange(len(ids_NA)):
        count = 0
        for a in range(ids_NA.shape[1]):
            if ids_NA[n, a] < 0:
                continue
            group, place = group_C[ids_NA[n, a]], 0
            while place < count and groups_NB[n, place] != group:
                place += 1
            if place == most:
                continue
            groups_NB[n, place] = group
            place_NA[n, a] = place
            count = max(count, place + 1)
        groups_NB[n, count:] = -1
