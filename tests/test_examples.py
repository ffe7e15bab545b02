"""The examples run on little data, learn, and never make the matrix of rows x classes in training.

Nothing here may reach the network: connecting is an error.
"""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slidex.nn import LSHSoftmaxLoss, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation returns while the newest head is in training mode."""

    heads: list[LSHSoftmaxLoss]

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.seen = [], set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.heads and self.heads[-1].training:
            self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out

    def wide(self, num_rows: int, num_classes: int) -> set[tuple[int, ...]]:
        """Shapes with at least so many rows of so many classes."""
        size = num_rows * num_classes
        return {shape for shape in self.seen if num_classes in shape and torch.Size(shape).numel() >= size}


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shapes]:
    recorder, init = Shapes(), LSHSoftmaxLoss.__init__

    def note(head: LSHSoftmaxLoss, *args: Any, **settings: Any) -> None:
        init(head, *args, **settings)
        recorder.heads.append(head)

    monkeypatch.setattr(LSHSoftmaxLoss, "__init__", note)
    with recorder:
        yield recorder
    assert recorder.seen


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def connect(*_: object) -> None:
        raise AssertionError("an example reached for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1), numba.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(before[0]), numba.set_num_threads(before[1])


def run(name: str, *arguments: object) -> dict[str, Any]:
    """What an example's main returns."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(word) for word in arguments])


def test_the_recorder_sees_what_it_looks_for(shapes: Shapes) -> None:
    for options, wide in ((SamplingOptions(pool_size=20), False), (None, True)):
        shapes.seen.clear()
        head = LSHSoftmaxLoss(8, 999, options=options)
        head(torch.randn(32, 8, requires_grad=True), torch.arange(32)).backward()
        assert bool(shapes.wide(32, 999)) is wide


def test_torch_loop(shapes: Shapes) -> None:
    results = run("torch_loop", "--classes", 5000, "--steps", 60, "--pool-size", 256)
    for result in results.values():
        assert result["last"] < result["first"] - 3
        assert result["P@1"] > 0.3
    # SparseAdam over the touched rows is the fused rule, so the two runs are one but for rounding.
    assert results["gradients"] == pytest.approx(results["fused"], rel=1e-3)
    assert not shapes.wide(256, 5000)


def test_huggingface_lm(shapes: Shapes, capsys: pytest.CaptureFixture) -> None:
    results = run("huggingface_lm", "--vocabulary", 2500, "--files", 12, "--steps", 80, "--pool-size", 256)
    for result in results.values():
        assert result["last"] < result["first"] - 2
        assert result["accuracy"] > result["most frequent"] + 0.03
    assert not shapes.wide(8 * 63, 2500)
    assert len(capsys.readouterr().out.split("\n\n", 1)[1].split()) > 3


def test_bert_tagging(shapes: Shapes) -> None:
    result = run("bert_tagging", "--documents", 1500, "--steps", 80, "--pool-size", 128)
    assert result["last"] < result["first"] - 1
    assert result["P@1"] > result["frequent P@1"] + 0.2
    assert not shapes.wide(64, result["tags"])


@pytest.mark.filterwarnings(
    # Lightning 2.6 looks at a class of torch's in a way that torch 2.13 deprecates.
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)
def test_lightning_module(shapes: Shapes) -> None:
    result = run("lightning_module", "--classes", 5000, "--steps", 40, "--pool-size", 256)
    before, half, end = (result[name] for name in ("before", "half", "end"))
    assert before["loss"] - 2 > half["loss"] > end["loss"] + 0.3
    assert end["P@1"] > 0.3
    assert result["updates"] == result["steps"] == 80
    assert not shapes.wide(256, 5000)


def test_hub_model(shapes: Shapes, tmp_path: Path) -> None:
    result = run("hub_model", "--tags", 500, "--steps", 60, "--folder", tmp_path)
    assert result["last"] < result["first"] - 2
    assert result["stored"] == ["head.bias", "head.weight", "words.weight"]
    assert result["same ids"]
    assert result["same scores"]
    assert result["found by the index"] > 0.9
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert not shapes.wide(256, 500)
