"""The archive for a GPU machine without a package index: versions that belong together, no tests, and not too large."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.cuda import pack

pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")

RUN = subprocess.run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pip is asked for; it makes a wheel of each, with a module and a test."""
    words: list[str] = []

    def run(command: list[str], **options: Any) -> object:
        if "pip" not in command:
            return RUN(command, **options)
        words[:] = command
        (folder,) = (Path(word.removeprefix("--dest=")) for word in command if word.startswith("--dest="))
        folder.mkdir()
        for wanted in (word for word in command if "==" in word):
            name = wanted.partition("==")[0].replace("-", "_")
            with zipfile.ZipFile(folder / f"{name}.whl", "w") as wheel:
                wheel.writestr(f"{name}/__init__.py", "")
                wheel.writestr(f"{name}/tests/test_it.py", "")
        return None

    monkeypatch.setattr(pack.subprocess, "run", run)
    return words


def test_the_versions_are_those_that_were_tested(asked: list[str], tmp_path: Path) -> None:
    assert pack.main([str(tmp_path / "bundle.tar.xz"), "--python", "3.12"]) == 0
    assert asked[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--python-version=3.12"} < set(asked)
    for name in pack.PACKAGES:
        assert f"{name}=={importlib.metadata.version(name)}" in asked
    with tarfile.open(tmp_path / "bundle.tar.xz") as archive:
        names = archive.getnames()
    assert "sitecustomize.py" in names
    assert "numba_cuda/__init__.py" in names
    assert not any("tests" in name for name in names)


def test_an_archive_too_large_to_carry_is_an_error(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pack, "MOST_BYTES", 100)
    assert pack.main([str(tmp_path / "bundle.tar.xz")]) == 1
    assert "more than the 0.0 MB" in capsys.readouterr().err
