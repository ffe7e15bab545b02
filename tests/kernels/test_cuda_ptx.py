"""Every CUDA kernel compiled to PTX, on a machine without a GPU: what a launch would compile, for two generations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numba
import numpy as np
import pytest
import torch

from slidex.errors import ConfigError
from slidex.kernels import RowState, StepSettings
from slidex.kernels.rounding import MIX_1, MIX_2, mix32
from tests.kernels.cases import KERNELS, SETTINGS, UPDATES, Problem, Shape, cast, moved
from tests.kernels.cuda.running import (
    CAPABILITIES,
    Launch,
    assembled,
    compile_ptx,
    entry_points,
    recorded_launches,
)

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = {  # the kernel of a function, where it has one; gather_rows is torch's
    "embedding_bag": "weighted_sums",
    "embedding_bag_update": "update_groups",
    "pair_logits": "logits",
    "pair_hidden_grad": "weighted_sums",
    "pair_update": "update_groups",
    "softmax_loss": "softmax_dense",
    "logistic_loss": "logistic_dense",
    "rows_update": "update_rows",
    "shared_softmax_loss": "softmax_shared",
    "shared_logistic_loss": "logistic_shared",
}
QUOTIENT = re.compile(r"div\.u32 .*\n\s*mul\.lo\.s32 .*")  # a remainder, of numbers found to be small
HASHED = re.compile(
    rf"mul\.lo\.s32 .*, (?:{MIX_1 - 2**32}|{MIX_2 - 2**32});"
)  # of the bits that round to 16 bits
MOST_REGISTERS = 80  # 255 is the most a thread can have; with 80, an SM still holds 24 warps


def _arguments(name: str, dtype: torch.dtype, device: str = "cpu") -> list[object]:
    arguments = Problem(Shape()).arguments(name, dtype)
    arguments = [cast(a, torch.float32) if isinstance(a, RowState) else a for a in arguments]
    return [moved(argument, device) for argument in arguments]


def _launch(name: str, dtype: torch.dtype) -> Launch:
    from slidex.kernels import cuda

    with recorded_launches() as launches:
        getattr(cuda, name)(*_arguments(name, dtype))
    assert [launch.kernel.name for launch in launches] == [COMPILED[name]]
    return launches[0]


def test_every_function_is_compiled_or_torchs() -> None:
    assert {*COMPILED, "gather_rows"} == set(KERNELS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_kernel_compiles_to_ptx(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    launch = _launch(name, dtype)
    for capability in CAPABILITIES:
        ptx = compile_ptx(launch, capability)
        assert f".target sm_{capability[0]}{capability[1]}" in ptx
        (entry,) = entry_points(ptx)
        assert f"_{COMPILED[name]}B" in entry
        assert ".f64" not in ptx, "arithmetic has widened to float64"
        assert not re.search(r"\.extern \.func|call\.uni|\.local", ptx), "a call or an array in slow memory"
        rounded = name in UPDATES and dtype.itemsize == 2
        assert bool(HASHED.search(ptx)) == rounded
        products = HASHED.sub("", QUOTIENT.sub("", ptx))
        assert not re.search(r"mul\.lo\.[su]32|mad\.lo\.[su]32", products), "an offset of 32 bits"
        said = assembled(ptx, capability, tmp_path)
        if said is not None:
            assert "0 bytes spill stores, 0 bytes spill loads" in said
            assert int(re.search(r"Used (\d+) registers", said)[1]) <= MOST_REGISTERS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "least"),
    [("pair_logits", 10), ("pair_hidden_grad", 4), ("embedding_bag", 4), ("shared_softmax_loss", 4)],
)
def test_a_lane_asks_for_several_numbers_before_it_waits_for_one(
    name: str, least: int, dtype: torch.dtype
) -> None:
    """Of rows anywhere in the memory one load on its way in each thread is a tenth of what the memory can give."""
    ptx = compile_ptx(_launch(name, dtype), (9, 0))
    loads = r"ld\.global\.(?:f32|u16|b16)"
    runs = (
        len(re.findall(loads, part)) for part in re.split(r"fma\.|bra |bar\.|^\$L", ptx, flags=re.MULTILINE)
    )
    assert max(runs) >= least


def test_the_hash_of_the_rounding_as_it_is_compiled_is_that_of_the_reference() -> None:
    """Numba's rules for unsigned numbers, which the simulator does not follow, on the CPU."""
    from slidex.kernels.cuda import device

    compiled = numba.njit(device.mix32.py_func)
    numbers = [*range(50), 2**31 - 1, 2**31, 2**32 - 1, *(7**n % 2**32 for n in range(12, 100))]
    assert [int(compiled(np.uint32(number))) for number in numbers] == [mix32(number) for number in numbers]


@pytest.mark.parametrize("name", UPDATES)
def test_whole_numbers_among_the_settings_compile_nothing_new(name: str) -> None:
    """And make no float64 of what they meet."""
    from slidex.kernels import cuda

    arguments = _arguments(name, torch.float32)
    with recorded_launches() as launches:
        getattr(cuda, name)(*arguments)
        arguments[-1] = StepSettings(learning_rate=1, step=1, beta1=0, epsilon=0, weight_decay=0)
        getattr(cuda, name)(*arguments)
    assert str(launches[0]) == str(launches[1])


@pytest.mark.parametrize("name", KERNELS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    """Tensors on "meta" have no values, so that whatever would read one on the host raises."""
    from slidex.kernels import cuda

    with recorded_launches(device_type="meta"):
        getattr(cuda, name)(*_arguments(name, torch.float32, "meta"))


@pytest.mark.parametrize(
    ("name", "at", "change", "message"),
    [
        (
            "pair_logits",
            0,
            lambda h: h.double(),
            r"'hidden_ND'.*float32, torch.bfloat16 or torch.float16.*float64",
        ),
        ("pair_logits", 1, lambda w: w[:, :5], r"'weight_CD'.*of shape"),
        ("pair_logits", 3, lambda a: a.double(), r"'active_NA'.*torch.int64 or torch.int32"),
        ("pair_logits", 2, lambda b: b.to("meta"), r"'bias_C'.*on the CPU"),
        ("pair_hidden_grad", 0, lambda g: g[:, 1:], r"'active_NA'.*of shape|'grad_NA'.*of shape"),
        ("pair_update", 3, lambda w: w.T.contiguous().T, r"'weight_CD'.*contiguous"),
        ("pair_update", 5, lambda s: s.to(torch.bfloat16), r"'moment1 of weight_CD'.*of dtype torch.float32"),
        ("pair_update", 6, lambda _: None, r"'state of bias_C'.*given with it"),
        ("embedding_bag", 0, lambda p: p.int(), r"'indptr'.*of dtype torch.int64"),
        ("embedding_bag_update", 2, lambda v: v[1:], r"'values'.*of shape"),
        ("rows_update", 5, lambda s: RowState(s.moment1[1:], s.moment2), r"'moment1 of weight_CD'.*of shape"),
        ("gather_rows", 2, lambda i: i.float(), r"'ids_U'.*torch.int64 or torch.int32"),
        ("shared_softmax_loss", 0, lambda z: z.T.contiguous().T, r"'logits_NU'.*contiguous"),
        ("shared_logistic_loss", 4, lambda w: w[1:], r"'weight_U'.*of shape"),
        ("softmax_loss", 1, lambda t: t[:, 1:], r"'target_NA'.*of shape"),
    ],
)
def test_bad_arguments_are_refused(name: str, at: int, change: object, message: str) -> None:
    from slidex.kernels import cuda

    arguments = _arguments(name, torch.float32)
    arguments[at] = change(arguments[at])
    with recorded_launches() as launches, pytest.raises(ConfigError, match=message):
        getattr(cuda, name)(*arguments)
    assert launches == []


def test_tensors_of_the_cpu_are_refused() -> None:
    from slidex.kernels import cuda

    for name in KERNELS:
        with pytest.raises(ConfigError, match=f"parameter of {name} must be on a CUDA device. Got 'cpu'"):
            getattr(cuda, name)(*_arguments(name, torch.float32))


def test_rows_too_wide_for_shared_memory_are_refused() -> None:
    from slidex.kernels import cuda

    weight, ids = torch.empty(1, 12289), torch.zeros(1, dtype=torch.int64)
    state = RowState.zeros_like(weight)
    with recorded_launches(), pytest.raises(ConfigError, match=r"'width' .* from 1 to 12288\. Got 12289"):
        cuda.rows_update(ids, weight, None, weight, None, state, None, SETTINGS)
