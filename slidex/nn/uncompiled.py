"""The loss on sampled classes as a break in the graphs of torch.compile, whose compiler this module imports (2 s)."""

from __future__ import annotations

import torch

from slidex.nn.sampling import Sampling

sampled_loss = torch.compiler.disable(Sampling.loss)
