"""What every benchmark prints and keeps: the machine it ran on, lines of a table, and a JSON file with the commit."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Processor, threads, versions and commit."""
    names = Path("/proc/cpuinfo")
    models = (
        [line for line in names.read_text().splitlines() if line.startswith("model name")]
        if names.exists()
        else []
    )
    processor = models[0].partition(": ")[2] if models else platform.processor()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "numpy": np.__version__,
        "commit": commit or "unknown",
    }


def print_row(label: str, cells: Sequence[str]) -> None:
    """One line: the label, then cells of equal width."""
    print(f"{label:<34}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def write_results(name: str, facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Writes ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": facts, "results": results}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
