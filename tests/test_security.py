"""Loading never executes code: nothing in the package can unpickle or evaluate, and pickles in disguise are refused."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import slidex
from slidex.data import Dataset, load_vectorizer, prepare_jsonl, prepare_npz
from slidex.errors import SlidexError
from slidex.train.checkpoint import list_checkpoints

SOURCES = sorted(Path(slidex.__file__).parent.rglob("*.py"))
BANNED_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code", "runpy",
}  # fmt: skip
DATA_FILES = [
    "train/x_indptr.npy",
    "train/y_indices.npy",
    "labels.jsonl",
    "vectorizer/idf.npy",
    "vectorizer/vocabulary.json",
]
BANNED_NAMES = {"eval", "exec", "compile", "__import__"}
BANNED_CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "np.fromregex", "pd.read_pickle"}


def violations(source: str) -> list[str]:
    """What in a module could run code from a file, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(alias.name for alias in node.names)]
        else:
            modules = []
        found += [f"{node.lineno}: import of {m}" for m in modules if m.split(".")[0] in BANNED_MODULES]
        if isinstance(node, ast.Name) and node.id in BANNED_NAMES:
            found.append(f"{node.lineno}: {node.id}")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in BANNED_CALLS:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call):
            pickles = {word.arg: word.value for word in node.keywords}.get("allow_pickle")
            forbidden = isinstance(pickles, ast.Constant) and pickles.value is False
            reads = ast.unparse(node.func) in {
                "np.load",
                "numpy.load",
                "read_array",
                "np.lib.format.read_array",
            }
            if not forbidden and (reads or pickles is not None):
                found.append(f"{node.lineno}: {ast.unparse(node.func)} without allow_pickle=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SOURCES[0].parent).as_posix())
def test_no_module_can_unpickle_or_evaluate(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "from os import marshal",
        "import yaml as y",
        "x = np.load(f)",
        "x = np.load(f, allow_pickle=True)",
        "x = np.load(f, allow_pickle=maybe)",
        "np.save(f, x, allow_pickle=True)",
        "load = torch.load",
        "torch.load(f, weights_only=True)",
        "eval('1')",
        "run = exec",
        "__import__('os')",
    ],
)
def test_the_scan_notices(source: str) -> None:
    assert len(violations(source)) == 1


def test_the_scan_lets_harmless_code_pass() -> None:
    source = "import numpy as np, re\nre.compile('a')\nmodel.eval()\nx = np.load(f, mmap_mode='r', allow_pickle=False)"
    assert violations(source) == []


class Payload:
    """Leaves a mark when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))  # noqa: S301
    assert (tmp_path / "mark").exists()


def poisons(mark: Path) -> list[bytes]:
    """A bare pickle, and an array of objects as numpy writes it."""
    array = mark.with_name("objects.npy")
    np.save(array, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    return [pickle.dumps(Payload(mark)), array.read_bytes()]


def reseal(file: Path, meta: Path, entry: dict) -> None:
    """Makes the record of a file agree with it, as an attacker would."""
    data = file.read_bytes()
    digest_size = len(entry["files"][file.relative_to(meta.parent).as_posix()]["blake2b"]) // 2
    entry["files"][file.relative_to(meta.parent).as_posix()] = {
        "bytes": len(data),
        "blake2b": hashlib.blake2b(data, digest_size=digest_size).hexdigest(),
    }
    meta.write_text(json.dumps(entry))


@pytest.mark.parametrize("poison", [0, 1])
@pytest.mark.parametrize("name", DATA_FILES)
def test_a_poisoned_data_set_is_refused(tmp_path: Path, name: str, poison: int) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a cat and a dog", "labels": "x"}\n' * 4)
    data = prepare_jsonl([texts], tmp_path / "data", test_fraction=0)
    (data.path / name).write_bytes(poisons(tmp_path / "mark")[poison])
    reseal(data.path / name, data.path / "meta.json", data.meta)
    with pytest.raises(SlidexError):
        use(data.path)
    assert not (tmp_path / "mark").exists()


def use(path: Path) -> None:
    """Reads all of a data set."""
    data = Dataset.open(path)
    data.verify()
    list(data.label_names() or ())
    load_vectorizer(path / "vectorizer")


@pytest.mark.parametrize("poison", [0, 1])
def test_a_poisoned_matrix_is_refused(tmp_path: Path, poison: int) -> None:
    (tmp_path / "x.npz").write_bytes(poisons(tmp_path / "mark")[poison])
    np.savez(tmp_path / "y.npz", format=np.array([Payload(tmp_path / "mark")], dtype=object))
    for pair in (("x.npz", "x.npz"), ("y.npz", "y.npz")):
        with pytest.raises(SlidexError):
            prepare_npz(tmp_path / pair[0], tmp_path / pair[1], tmp_path / "data")
    assert not (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def trained(easy_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> slidex.Run:
    config = slidex.TrainConfig(mode="exact", max_steps=1, hidden_width=8)
    return slidex.fit(easy_data, tmp_path_factory.mktemp("trained") / "run", config)


@pytest.mark.parametrize("poison", [0, 1])
@pytest.mark.parametrize("name", ["encoder.safetensors", "head.safetensors"])
def test_a_poisoned_checkpoint_is_refused(
    trained: slidex.Run, tmp_path: Path, name: str, poison: int
) -> None:
    shutil.copytree(trained.path, tmp_path / "run")
    run = slidex.Run.open(tmp_path / "run")
    checkpoint = list_checkpoints(run.checkpoints)[-1]
    (checkpoint.path / name).write_bytes(poisons(tmp_path / "mark")[poison])
    manifest = checkpoint.path / "MANIFEST.json"
    entry = {"files": json.loads(manifest.read_text())}
    reseal(checkpoint.path / name, manifest, entry)
    manifest.write_text(json.dumps(entry["files"]))
    with pytest.raises(SlidexError, match="cannot be read"):
        run.model()
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("poison", [0, 1])
def test_a_poisoned_run_is_refused(trained: slidex.Run, tmp_path: Path, poison: int) -> None:
    shutil.copytree(trained.path, tmp_path / "run")
    file = tmp_path / "run" / "names" / "class_counts.npy"
    file.write_bytes(poisons(tmp_path / "mark")[poison])
    reseal(file, tmp_path / "run" / "run.json", dict(trained.meta))
    with pytest.raises((SlidexError, ValueError)):
        slidex.Run.open(tmp_path / "run").model()
    assert not (tmp_path / "mark").exists()
