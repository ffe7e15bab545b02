"""What this machine offers, and which way of training the output layer fits it.

Every probe stands alone: one that finds nothing to read on another system answers "unknown (why)" and the
rest of the report still comes. The plan is a cost model of a few measured rates, good to perhaps a third; it
decides between modes that differ by factors, and prefers the simpler mode where they do not.

Symbols: N rows in a batch, C classes, D hidden width, A active classes a row, U classes of a pool, L hash tables.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch

import slidex
from slidex.errors import ConfigError
from slidex.kernels.cuda import environment
from slidex.kernels.optimizer import state_size
from slidex.lsh import index_names

if TYPE_CHECKING:
    from collections.abc import Callable

# Rates of one training step in nanoseconds, measured on one AVX-512-BF16 server core with N = 256, D = 128,
# C = 670,091 (dense) and 1,000 active classes per row (pairs); selection with C = 283,447 and the default tables, 8 of
# them for a pool and 50 for sets of each row.
# At that width a dense step takes 12.7 (float32) or 3.3 (bfloat16) per row and class, a pair 212.
PRODUCT_NS = {"float32": 0.0923, "bfloat16": 0.0182}  # per row, class, dimension: scores and both gradients
SOFTMAX_NS = 0.6  # per row and class
ADAM_NS = 0.65  # per weight, all rows in order
GATHER_NS = 0.72  # per weight copied into the pool's block
SCATTERED_ADAM_NS = 1.65  # per weight, rows in random order
PAIR_NS = 33.0  # per row and active class: softmax, transposing the pairs
PAIR_DIMENSION_NS = 1.4  # per row, active class and dimension: scores, both gradients, Adam
# Hashing, voting, random classes and merging, per row.
SELECTION_NS = {"shared": 12_000.0, "per_sample": 55_000.0}

NEAR_TIE = 1.25
"""A mode within this factor of the fastest counts as equally fast; the first in `MODES` wins then."""

MODES = ("exact", "shared", "per_sample")

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_FAISS_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeCost:
    """What one mode costs.

    Args:
        milliseconds: One step of the output layer on one core; encoder and rehashing are not in it.
        weight_bytes: float32 weight rows, C D.
        optimizer_bytes: float32 moments: 2 C D (adam), C D + C (rowwise_adam) or C (rowwise_adagrad).
        index_bytes: Codes and ids of the hash tables, int32, 2 C L; 0 without an index.
        activation_bytes: Scores, gradients and gathered rows of one batch.
    """

    milliseconds: float
    weight_bytes: int
    optimizer_bytes: int
    index_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """All four together."""
        return self.weight_bytes + self.optimizer_bytes + self.index_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The mode that fits, and what led to it.

    Args:
        mode: One of `MODES`.
        precision: Of the matrix products in the estimate, ``float32`` or ``bfloat16``.
        fits: Whether that mode's memory is within what was said to be available.
        reason: One sentence for a person.
        costs: The cost of every mode, by name.
    """

    mode: str
    precision: str
    fits: bool
    reason: str
    costs: dict[str, ModeCost]


def plan(
    num_classes: int,
    hidden_width: int,
    batch_size: int,
    *,
    pool_size: int = 4096,
    active: int = 512,
    num_tables: int = 50,
    optimizer: str = "adam",
    native_bf16: bool = False,
    available_bytes: int | None = None,
) -> Plan:
    """Choose a training mode for the output layer by estimated time, among the modes that fit in memory.

    The step times, with the module's rates, A = min(active, C) and U = min(pool_size + N, C) (a pool also
    holds the batch's true classes, taken as one a row):

    * exact: ``N C (D product + softmax) + C D adam``
    * shared: ``N U (D product + softmax) + U D (gather + scattered adam) + N selection``
    * per_sample: ``N A (pair + D pair_dimension) + N selection``

    More cores speed all modes up alike, so they do not enter. Rehashing is left out: schedules spread it out.

    Args:
        num_classes: C.
        hidden_width: D.
        batch_size: N.
        pool_size: Negative classes in a batch's pool (shared).
        active: Active classes per row (per_sample).
        num_tables: L, hash tables of the index.
        optimizer: One of `slidex.kernels.OPTIMIZERS`; it enters the memory, the step times are Adam's.
        native_bf16: Whether the matrix products run on bfloat16 instructions.
        available_bytes: Memory the mode must fit in; None to ignore memory. If no mode fits, the one that
            needs least is named and `Plan.fits` is False.

    Raises:
        ConfigError: A size is not a positive integer, or there is no such optimizer.
    """
    sizes = (num_classes, hidden_width, batch_size, pool_size, active, num_tables)
    names = ("num_classes", "hidden_width", "batch_size", "pool_size", "active", "num_tables")
    for name, size in zip(names, sizes, strict=True):
        if not isinstance(size, int) or size < 1:
            raise ConfigError(
                f"The {name!r} parameter of plan must be an integer >= 1. Got {size!r} instead."
            )
    precision = "bfloat16" if native_bf16 else "float32"
    costs = _mode_costs(*sizes, precision, optimizer)
    limit = float("inf") if available_bytes is None else available_bytes
    fitting = [mode for mode in MODES if costs[mode].total_bytes <= limit]
    if not fitting:
        mode = min(MODES, key=lambda name: costs[name].total_bytes)
        need = _size(costs[mode].total_bytes)
        reason = f"No mode fits: even {mode} needs {need} of {_size(limit)} available."
        return Plan(mode=mode, precision=precision, fits=False, reason=reason, costs=costs)
    fastest = min(costs[mode].milliseconds for mode in fitting)
    mode = next(mode for mode in fitting if costs[mode].milliseconds <= NEAR_TIE * fastest)
    reason = _reason(mode, costs, [name for name in MODES if name not in fitting])
    return Plan(mode=mode, precision=precision, fits=True, reason=reason, costs=costs)


def _mode_costs(
    C: int, D: int, N: int, pool_size: int, active: int, num_tables: int, precision: str, optimizer: str
) -> dict[str, ModeCost]:
    A, U = min(active, C), min(pool_size + N, C)
    per_score = D * PRODUCT_NS[precision] + SOFTMAX_NS
    nanoseconds = {
        "exact": N * C * per_score + C * D * ADAM_NS,
        "shared": N * U * per_score + U * D * (GATHER_NS + SCATTERED_ADAM_NS) + N * SELECTION_NS["shared"],
        "per_sample": N * A * (PAIR_NS + D * PAIR_DIMENSION_NS) + N * SELECTION_NS["per_sample"],
    }
    activation_bytes = {
        "exact": 4 * N * C,  # scores, at most; the gradient of W is made in pieces
        "shared": 4 * (N * U + 2 * U * D),  # scores, gathered rows, their gradient
        "per_sample": 24 * N * A,  # int64 id, score, gradient, transposed pair
    }
    return {
        mode: ModeCost(
            milliseconds=nanoseconds[mode] / 1e6,
            weight_bytes=4 * C * D,
            optimizer_bytes=4 * C * state_size(optimizer, D),
            index_bytes=0 if mode == "exact" else 8 * C * num_tables,
            activation_bytes=8 * N * D + activation_bytes[mode],
        )
        for mode in MODES
    }


def _reason(mode: str, costs: dict[str, ModeCost], too_large: list[str]) -> str:
    times = {name: f"{cost.milliseconds:.3g} ms" for name, cost in costs.items()}
    others = " and ".join(f"{times[name]} for {name}" for name in MODES if name != mode)
    why = {
        "exact": "sampling classes would gain little or nothing",
        "shared": "matrix products on one pool are the cheapest way to see many negatives",
        "per_sample": "few classes for each row cost least",
    }[mode]
    memory = f"; {' and '.join(too_large)} would not fit in memory" if too_large else ""
    return f"{mode}: {why}: {times[mode]} a step against {others}{memory}."


def has_native_bf16() -> bool | None:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512_BF16, AMX or ARM's bf16).

    Returns:
        None where the system does not say (no /proc/cpuinfo).
    """
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if flags is None else not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def report(
    num_classes: int | None = None,
    hidden_width: int = 128,
    batch_size: int = 256,
    dtype: str = "auto",
    optimizer: str = "adam",
) -> dict[str, Any]:
    """Describe the environment, and the plan for a model if `num_classes` is given.

    Args:
        num_classes: C of the model to plan for; None for no plan.
        hidden_width: D.
        batch_size: N.
        dtype: Of the matrix products: ``auto`` (bfloat16 where native, as in training), ``float32`` or
            ``bfloat16`` (planned as float32 where it is not native: emulation is no faster).
        optimizer: As in `plan`.

    Returns:
        A nested dict that JSON can hold; sizes in bytes. A probe that failed is the string "unknown (why)".

    Raises:
        ConfigError: `dtype` is none of the three, or as in `plan`.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(
            f"The 'dtype' parameter of report must be 'auto', 'float32' or 'bfloat16'. Got {dtype!r} instead."
        )
    bf16 = has_native_bf16()
    memory = _probe(_memory)
    result: dict[str, Any] = {
        "versions": _probe(_versions),
        "cpu": {
            "model": _probe(_cpu_model),
            "usable_cores": _probe(_usable_cores),
            "simd": _probe(torch.backends.cpu.get_cpu_capability),
            "native_bf16": "unknown (no /proc/cpuinfo with flags)" if bf16 is None else bf16,
        },
        "memory": memory,
        "disk_free_bytes": _probe(lambda: shutil.disk_usage(Path.cwd()).free),
        "threads": {
            "torch": _probe(torch.get_num_threads),
            "numba": _probe(numba.get_num_threads),
            "numba_layer": _probe(_threading_layer),
        },
        "gpu": _probe(environment.gpus),
        "cuda_driver": _probe(environment.driver),
        "numba_cuda": _probe(lambda: _installed("numba-cuda", "numba-cuda-mlir")),
        "cuda_kernels": _probe(environment.readiness),
        "faiss": _probe(_faiss),
        "indexes": ", ".join(index_names()),
    }
    if num_classes is not None:
        available = memory.get("available_bytes") if isinstance(memory, dict) else None
        chosen = plan(
            num_classes,
            hidden_width,
            batch_size,
            optimizer=optimizer,
            native_bf16=dtype != "float32" and bf16 is True,
            available_bytes=available if isinstance(available, int) else None,
        )
        result["plan"] = {"num_classes": num_classes, "hidden_width": hidden_width, "batch_size": batch_size}
        result["plan"] |= asdict(chosen)
    return result


def format_report(result: dict[str, Any]) -> str:
    """The report as aligned lines for a terminal, without a final newline.

    Args:
        result: What `report` returned.
    """
    lines = []
    for section, content in result.items():
        if section == "plan":
            continue
        entries = content.items() if isinstance(content, dict) else [("", content)]
        for key, value in entries:
            name = f"{section} {key}".strip().removesuffix("_bytes").replace("_", " ")
            lines.append(f"{name:<24}{_shown(key or section, value)}")
    if "plan" in result:
        lines += ["", *_plan_lines(result["plan"])]
    return "\n".join(lines)


def _plan_lines(chosen: dict[str, Any]) -> list[str]:
    header = ("", "ms/step", "weights", "optimizer", "index", "activations")
    parts = ("weight", "optimizer", "index", "activation")
    rows = [
        (mode, f"{cost['milliseconds']:.3g}", *(_size(cost[f"{part}_bytes"]) for part in parts))
        for mode, cost in chosen["costs"].items()
    ]
    return [
        f"plan for {chosen['num_classes']:,} classes, width {chosen['hidden_width']:,}, "
        f"batch {chosen['batch_size']:,}, {chosen['precision']} products (estimate, one core)",
        *("".join(f"{cell:>13}" for cell in row) for row in (header, *rows)),
        chosen["reason"],
    ]


def _shown(key: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(
            f"{gpu['name']} ({_size(gpu['memory_bytes'])}, {_size(gpu['free_bytes'])} free)" for gpu in value
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _size(value) if key.endswith("_bytes") and isinstance(value, int) else str(value)


def _size(num_bytes: float) -> str:
    """Bytes as GiB, MiB or KiB with one decimal."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def _probe(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # noqa: BLE001  (a report on a strange system must come out whole)
        return f"unknown ({type(error).__name__}: {error})"


def _installed(*distributions: str) -> str:
    """Name and version of each of the distributions that is there."""
    found = []
    for name in distributions:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or "not installed"


def _versions() -> dict[str, str]:
    versions = {"slidex": slidex.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("numba", "numpy", "scipy", "scikit-learn"):
        versions[name] = _installed(name).removeprefix(f"{name} ")
    return versions


def _faiss() -> str:
    wheels = _installed(*_FAISS_WHEELS)
    if wheels == "not installed" and importlib.util.find_spec("faiss"):
        return "installed, from an unknown wheel"
    return f"{wheels} (keep only one: they overwrite each other)" if "," in wheels else wheels


def _cpu_model() -> str:
    text = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    named = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> dict[str, int | str]:
    """Total and available bytes, no more than the container's limit."""
    if not _MEMINFO.exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"total_bytes": total, "available_bytes": "unknown (no /proc/meminfo)"}
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE))
    total, available = 1024 * int(kilobytes["MemTotal"]), 1024 * int(kilobytes["MemAvailable"])
    limit_file = _CGROUP / "memory.max"
    limit = limit_file.read_text().strip() if limit_file.exists() else "max"
    if limit != "max":
        used = int((_CGROUP / "memory.current").read_text())
        total, available = min(total, int(limit)), min(available, int(limit) - used)
    return {"total_bytes": total, "available_bytes": available}


@numba.njit(cache=True, parallel=True)
def _fill(out):
    for i in numba.prange(len(out)):
        out[i] = i


def _threading_layer() -> str:
    """Numba picks its layer when the first parallel kernel runs, so run one."""
    _fill(np.empty(64, dtype=np.int64))
    return numba.threading_layer()
