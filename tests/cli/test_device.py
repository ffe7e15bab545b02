"""`--device` where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from slidex.kernels.cuda import environment


def test_a_gpu_that_is_not_there_is_one_clear_line(invoke, easy_data, trained, tmp_path, monkeypatch):
    pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")
    monkeypatch.setattr(environment, "_built_for", lambda: None)
    line = f"Error: This torch ({torch.__version__}) is built without CUDA. Install a CUDA build of torch: "
    for words in (
        ("train", easy_data.path, "--out", tmp_path / "run", "--device", "cuda"),
        ("eval", trained, easy_data.path, "--device", "cuda"),
        ("predict", trained, easy_data.path, "--device", "cuda:3"),
    ):
        result = invoke(*words, code=1)
        assert result.stderr.startswith(line), result.stderr
        assert result.stdout == ""
    assert not (tmp_path / "run").exists()
    for words in (("train", easy_data.path, "--out", tmp_path / "run"), ("eval", trained, easy_data.path)):
        result = invoke(*words, "--device", "gpu", code=2)
        assert (
            result.stderr == "Error: The 'device' setting must be cpu, cuda or cuda:N. Got 'gpu' instead.\n"
        )
