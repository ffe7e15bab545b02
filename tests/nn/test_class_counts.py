"""`SamplingOptions.class_counts` is checked where a loss is made, whichever setting reads it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slidex.errors import ConfigError
from slidex.nn import LSHSoftmaxLoss, SamplingOptions

USES = {"logq": {"correction": "logq"}, "power": {"random_power": 0.5}, "none": {}}
WRONG = {
    "too long": np.ones(21),
    "too short": np.ones(19),
    "negative": np.r_[np.ones(19), -1],
    "not finite": np.r_[np.ones(19), np.nan],
    "a table": np.ones((20, 1)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wrong", WRONG)
def test_counts_that_do_not_fit_are_refused(use, wrong) -> None:
    options = SamplingOptions(class_counts=WRONG[wrong], index="none", **USES[use])
    with pytest.raises(
        ConfigError, match=r"'class_counts' setting must hold 20 finite counts of at least 0\. Got"
    ):
        LSHSoftmaxLoss(4, 20, options=options)


@pytest.mark.parametrize("use", ["logq", "power"])
def test_fractions_count_as_they_are(use) -> None:
    """Rounded down, these would all be 0."""
    torch.manual_seed(0)
    hidden_ND, target_N = torch.randn(6, 4), torch.arange(6)
    losses = []
    for counts in (torch.linspace(0.1, 0.9, 20), torch.zeros(20), 1000 * torch.linspace(0.1, 0.9, 20)):
        torch.manual_seed(1)
        options = SamplingOptions(
            class_counts=counts, index="none", pool_size=5, precision="float32", **USES[use]
        )
        losses.append(float(LSHSoftmaxLoss(4, 20, options=options)(hidden_ND, target_N).detach()))
    if use == "logq":
        assert losses[0] == pytest.approx(losses[2], rel=1e-4)
        assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    else:  # a class that was not seen counts as once
        assert losses[0] == losses[1]
        assert losses[0] != pytest.approx(losses[2], rel=1e-4)
