"""What people use without slidex, written as well as torch allows: the dense softmax, and torch's own sparse tools.

Both start from the weights of a slidex model and take the same batches, so that every comparison is between ways to do
one and the same step. Letters: N rows in a batch, C classes, F features, D hidden width, U classes in a pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.nn.candidates import ActiveSets, Pool
    from slidex.nn.classifier import Classifier


class _BagOfFeatures(nn.Module):
    """``relu(sum of feature rows + bias)``, as `slidex.nn.encoder.BagEncoder` without dense layers."""

    def __init__(self, model: Classifier, *, sparse: bool) -> None:
        super().__init__()
        encoder = model.encoder
        self.normalize = encoder.rules.normalize
        self.bag = nn.EmbeddingBag.from_pretrained(
            encoder.bag.detach().clone(), freeze=False, mode="sum", sparse=sparse
        )
        self.bias = nn.Parameter(encoder.bias.detach().clone())

    def forward(self, x: CsrArrays) -> torch.Tensor:
        values = np.ones(x.nnz, dtype=np.float32) if x.values is None else x.values
        if self.normalize:
            counts = np.diff(x.indptr)
            norms = np.sqrt(np.bincount(x.row_ids(), weights=np.square(values), minlength=x.num_rows))
            values = (values / np.repeat(np.maximum(norms, 1e-30), counts)).astype(np.float32)
        sums_ND = self.bag(
            torch.from_numpy(x.indices),
            torch.from_numpy(x.indptr[:-1].astype(np.int32)),
            per_sample_weights=torch.from_numpy(values),
        )
        return torch.relu(sums_ND + self.bias)


def _target_rows(labels: CsrArrays) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of every stored label, and its share of the row's target mass."""
    counts = np.diff(labels.indptr)
    weights = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
    return torch.from_numpy(labels.row_ids()), torch.from_numpy(weights)


class DenseHead:
    """An output layer whose loss and gradients are those of a softmax over all classes; nothing large is allocated.

    Args:
        weight_CD: Rows that it starts from.
        bias_C: Their bias.
        batch_size: N, at most.
        precision: ``bfloat16`` for the matrix products and the scores where the CPU has instructions for it, else
            ``float32``: what is faster.
    """

    def __init__(
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor, batch_size: int, precision: str
    ) -> None:
        self.weight = nn.Parameter(weight_CD.detach().clone())
        self.bias = nn.Parameter(bias_C.detach().clone())
        self.weight.grad, self.bias.grad = torch.empty_like(self.weight), torch.empty_like(self.bias)
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        low = self.dtype != torch.float32
        self._product_weight = self.weight.detach().to(self.dtype) if low else self.weight.detach()
        self._product_grad = torch.empty_like(self._product_weight) if low else self.weight.grad
        self._product_bias = self.bias.detach().to(self.dtype) if low else self.bias.detach()
        self._scores_NC = torch.empty((batch_size, len(self.weight)), dtype=self.dtype)

    @torch.no_grad()
    def loss_and_grad(
        self, hidden_ND: torch.Tensor, rows: torch.Tensor, classes: torch.Tensor, mass: torch.Tensor
    ) -> tuple[float, torch.Tensor]:
        """Mean loss of a batch, and its gradient by `hidden_ND`; that of the layer is left in ``weight.grad``.

        Args:
            hidden_ND: float32 (N, D).
            rows: int64 (P,), the row of every label.
            classes: int64 (P,), its class.
            mass: float32 (P,), its share of the row's target mass.
        """
        num_rows = len(hidden_ND)
        factor_ND = hidden_ND.to(self.dtype)
        scores_NC = self._scores_NC[:num_rows]
        torch.addmm(self._product_bias, factor_ND, self._product_weight.T, out=scores_NC)
        torch.softmax(scores_NC, 1, out=scores_NC)
        true = scores_NC[rows, classes].float()
        loss = -float((mass * true.log()).sum()) / num_rows
        scores_NC[rows, classes] = (true - mass).to(self.dtype)  # now the scores' gradient, times N
        torch.mm(scores_NC.T, factor_ND / num_rows, out=self._product_grad)
        if self.weight.grad is not self._product_grad:
            self.weight.grad.copy_(self._product_grad)
        torch.sum(scores_NC, 0, dtype=torch.float32, out=self.bias.grad)
        self.bias.grad /= num_rows
        return loss, (scores_NC @ self._product_weight).float() / num_rows

    @torch.no_grad()
    def updated(self) -> None:
        """Says that an optimiser has changed the parameters."""
        if self.dtype != torch.float32:
            self._product_weight.copy_(self.weight)
            self._product_bias.copy_(self.bias)


class DenseSoftmax:
    """Softmax over all classes with torch's fused Adam; nothing of size N x C or C x D is allocated in a step.

    Args:
        model: Whose weights it starts from.
        batch_size: N, at most.
        precision: See `DenseHead`.
    """

    def __init__(self, model: Classifier, batch_size: int, precision: str) -> None:
        self.encoder = _BagOfFeatures(model, sparse=False)
        self.head = DenseHead(model.head.weight, model.head.bias, batch_size, precision)
        self.weight, self.bias = self.head.weight, self.head.bias
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), self.weight, self.bias], fused=True)

    def step(self, x: CsrArrays, labels: CsrArrays, learning_rate: float) -> float:
        """One optimiser step on a batch; returns its mean loss."""
        hidden_ND = self.encoder(x)
        rows, mass = _target_rows(labels)
        loss, grad_ND = self.head.loss_and_grad(
            hidden_ND, rows, torch.from_numpy(labels.indices).long(), mass
        )
        hidden_ND.backward(grad_ND)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.head.updated()
        self.encoder.zero_grad(set_to_none=False)
        return loss

    @torch.no_grad()
    def best_classes(self, x: CsrArrays, rows_at_once: int = 256) -> torch.Tensor:
        """The class with the highest score, for every row: int64 (N,)."""
        best = []
        for start in range(0, x.num_rows, rows_at_once):
            rows = x.take(np.arange(start, min(start + rows_at_once, x.num_rows)))
            best.append((self.encoder(rows) @ self.weight.T + self.bias).argmax(1))
        return torch.cat(best)


class SparseSoftmax:
    """Softmax over given candidates with ``EmbeddingBag(sparse=True)``, gathered rows and ``SparseAdam``.

    Args:
        model: Whose weights it starts from.
        precision: Of the matrix products over a shared pool.
    """

    def __init__(self, model: Classifier, precision: str) -> None:
        self.encoder = _BagOfFeatures(model, sparse=True)
        weight_CD, bias_C = model.head.weight.detach().clone(), model.head.bias.detach().clone()
        self.rows = nn.Embedding.from_pretrained(weight_CD, freeze=False, sparse=True)
        self.biases = nn.Embedding.from_pretrained(bias_C[:, None], freeze=False, sparse=True)
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.optimizers = [
            torch.optim.SparseAdam([self.encoder.bag.weight, self.rows.weight, self.biases.weight]),
            torch.optim.Adam([self.encoder.bias], fused=True),
        ]

    def step(
        self, x: CsrArrays, labels: CsrArrays, candidates: Pool | ActiveSets, learning_rate: float
    ) -> float:
        """One optimiser step on a batch and its candidates, a shared pool or a set for each row; the mean loss."""
        hidden_ND = self.encoder(x)
        if hasattr(candidates, "ids_U"):
            loss = self._pool_loss(hidden_ND, labels, candidates)
        else:
            loss = self._set_loss(hidden_ND, candidates)
        loss = loss / x.num_rows
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def _pool_loss(self, hidden_ND: torch.Tensor, labels: CsrArrays, pool: Pool) -> torch.Tensor:
        bias_U = self.biases(pool.ids_U)[:, 0]
        if pool.offset_U is not None:
            bias_U = bias_U + pool.offset_U
        rows_UD = self.rows(pool.ids_U).to(self.dtype)
        logits_NU = (hidden_ND.to(self.dtype) @ rows_UD.T).float() + bias_U
        rows, mass = _target_rows(labels)
        return -(mass * logits_NU.log_softmax(1)[rows, pool.target_positions]).sum()

    def _set_loss(self, hidden_ND: torch.Tensor, sets: ActiveSets) -> torch.Tensor:
        pads_NA = sets.active_NA < 0
        ids_NA = sets.active_NA.clamp(min=0)
        logits_NA = (
            torch.bmm(self.rows(ids_NA), hidden_ND[:, :, None])[:, :, 0] + self.biases(ids_NA)[:, :, 0]
        )
        if sets.offset_NA is not None:
            logits_NA = logits_NA + sets.offset_NA
        log_softmax_NA = logits_NA.masked_fill(pads_NA, -torch.inf).log_softmax(1)
        return -(sets.target_NA * log_softmax_NA.masked_fill(pads_NA, 0)).sum()
