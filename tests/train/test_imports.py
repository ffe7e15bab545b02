"""Training and prediction do not wait for packages that they do not use."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from slidex.data import CsrArrays, DatasetWriter

CODE = """
import sys
import slidex
from slidex.train import ranking
from slidex.train.config import TrainConfig

ranking.EXACT_CLASSES = 10  # as where there are many: candidates of an index that learns
data = slidex.Dataset.open(sys.argv[1])
settings = {"hidden_width": 8, "mode": "shared", "pool_size": 20, "max_steps": 2}
settings |= {"ranker_candidates": 5, "ranker_neighbors": 5}
run = slidex.fit(data, sys.argv[2], TrainConfig.from_mapping(settings))
print(slidex.evaluate(run, data, split="train")["rows"])
print([name for name in ("sklearn", "torch._dynamo", "sympy") if name in sys.modules])
"""


def test_training_imports_neither_torchs_compiler_nor_scikit_learn(tmp_path):
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "data") as writer:
        y = rng.integers(0, 40, 200).astype(np.int32)
        writer.append("train", CsrArrays(np.arange(201), y, None, 40), CsrArrays(np.arange(201), y, None, 40))
        writer.finish(num_features=40, num_classes=40, source={"format": "test", "files": [], "options": {}})
    command = [sys.executable, "-c", CODE, str(tmp_path / "data"), str(tmp_path / "run")]
    assert subprocess.check_output(command, text=True).split("\n")[-3:-1] == ["200", "[]"]
