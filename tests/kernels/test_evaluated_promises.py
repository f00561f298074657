"""What the evaluator of Gluon source promises, each on a small kernel: addresses, widths, rounding, copies under way, and what it refuses."""

from __future__ import annotations

import itertools
import resource
from typing import Any

import evaluated_kernels as kernels
import pytest
import torch
from gluon_evaluator import EvaluatedExecutor
from gluon_evaluator.errors import RefusedProgramError, UnknownToEvaluatorError
from gluon_evaluator.promotion import argument_type, computed_in
from gluon_evaluator.values import Tensor
from triton.experimental.gluon import language as gl
from triton.language.semantic import TritonSemantic

from patune.errors import EmulatorError
from patune.kernels.calls import KernelCall

N = 128
CACHE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32)
POISONED_INTEGER = 0x7F7F7F7F


def run(kernel: Any, grid: tuple[int, int, int] = (1, 1, 1), **arguments: Any) -> None:
    """Launch a kernel; capitals are constants."""
    constants = {name: value for name, value in arguments.items() if name.isupper()}
    at_run_time = {name: value for name, value in arguments.items() if not name.isupper()}
    call = KernelCall(kernel=kernel, grid=grid, arguments=at_run_time, constants=constants)
    EvaluatedExecutor().run([call])


def counted(dtype: torch.dtype = torch.float32, n: int = N) -> torch.Tensor:
    """1, 2, ...: as far as fp8 counts exactly, then from 1 again."""
    return (torch.arange(n) % 16 + 1).to(torch.float32).to(dtype)


def part_of(size: int, first: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor inside of a larger storage, so that memory before and after it exists."""
    return counted(dtype, size)[first : first + n]


# Memory.


@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_masked_lanes_get_other(dtype: torch.dtype) -> None:
    source, found = counted(dtype), torch.zeros(N).to(dtype)
    run(kernels.copy_masked, from_ptr=source, to_ptr=found, first=0, kept=100, other=-3, N=N, WITH_OTHER=True)  # fmt: skip
    expected = source.float()
    expected[100:] = -3
    assert torch.equal(found.float(), expected)


def test_masked_lanes_without_other_are_poison() -> None:
    found = torch.zeros(N)
    run(kernels.copy_masked, from_ptr=counted(), to_ptr=found, first=0, kept=100, other=0, N=N, WITH_OTHER=False)  # fmt: skip
    assert torch.equal(found[:100], counted()[:100])
    assert found[100:].isnan().all()


@pytest.mark.parametrize(("first", "kept"), [(-1, 1), (1, N), (-(2**33), 1), (2**31, 1)])
def test_a_load_outside_of_the_argument_is_refused_and_named(first: int, kept: int) -> None:
    source, found = part_of(4 * N, N, N), torch.zeros(N)
    offset = first if kept == 1 else N
    with pytest.raises(EmulatorError, match=rf"load of from_ptr at element offset {offset}: .* 128 elements.*program \(0, 0, 0\) of copy_masked"):  # fmt: skip
        run(kernels.copy_masked, from_ptr=source, to_ptr=found, first=first, kept=kept, other=0, N=N, WITH_OTHER=True)  # fmt: skip


def test_offsets_of_masked_lanes_are_not_followed() -> None:
    source, found = part_of(4 * N, N, N), torch.zeros(N)
    run(kernels.copy_masked, from_ptr=source, to_ptr=found, first=100, kept=28, other=9, N=N, WITH_OTHER=True)  # fmt: skip
    assert torch.equal(found, torch.cat([source[100:], torch.full((100,), 9.0)]))


@pytest.mark.parametrize(("first", "offset"), [(-1, -1), (N - 9, N)])
def test_a_store_outside_of_the_argument_is_refused_and_changes_nothing(
    first: int, offset: int
) -> None:
    found = part_of(4 * N, N, N)
    before = torch.empty(0).set_(found.untyped_storage()).clone()
    with pytest.raises(EmulatorError, match=f"store of to_ptr at element offset {offset}"):
        run(kernels.store_masked, from_ptr=counted(), to_ptr=found, first=first, kept=10, N=N)
    assert torch.equal(torch.empty(0).set_(found.untyped_storage()), before)


def test_a_masked_store_leaves_the_rest() -> None:
    found = torch.zeros(N)
    run(kernels.store_masked, from_ptr=counted(), to_ptr=found, first=3, kept=10, N=N)
    assert torch.equal(found, torch.cat([torch.zeros(3), counted()[:10], torch.zeros(N - 13)]))


def test_a_sparse_buffer_is_never_copied() -> None:
    stride = 1 << 29
    fp8 = torch.float8_e4m3fn
    source, found = torch.empty(5 * stride + 1, dtype=fp8), torch.zeros(1).to(fp8)
    source[-1] = 40.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(kernels.multiply_offsets, from_ptr=source, to_ptr=found, page=5, stride=stride, WIDE=True)
    assert float(found) == 40.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_a_32_bit_offset_wraps_to_another_address() -> None:
    found = torch.zeros(1).to(torch.float8_e4m3fn)
    source = torch.empty((1 << 30) + 1, dtype=torch.float8_e4m3fn)
    source[-1] = 7.0  # 2^30 is 5 * 2^30 in 32 bits
    arguments = {"from_ptr": source, "to_ptr": found, "stride": 1 << 30, "WIDE": False}
    run(kernels.multiply_offsets, page=5, **arguments)
    assert float(found) == 7.0
    with pytest.raises(EmulatorError, match="from_ptr at element offset -2147483648"):
        run(kernels.multiply_offsets, page=2, **arguments)


# Numbers.


def test_32_bit_integers_wrap_and_64_bit_ones_do_not() -> None:
    found = torch.zeros(6, dtype=torch.int64)
    run(kernels.integer_arithmetic, to_ptr=found, a=100_003, b=70_001)
    product = 100_003 * 70_001
    wrapped = (product + 2**31) % 2**32 - 2**31
    assert found.tolist() == [wrapped, product, 100_003 + 2**31 - 1 - 2**32, -1, -30_002, 30_003]


def test_an_argument_beyond_32_bits_makes_64_bit_arithmetic() -> None:
    found = torch.zeros(6, dtype=torch.int64)
    run(kernels.integer_arithmetic, to_ptr=found, a=2**31, b=3)
    assert found.tolist() == [3 * 2**31, 3 * 2**31, 2**32 - 1, -(2**31 // 3), -2, 2**31 - 2]
    limits = [argument_type(n) for n in (2**31 - 1, -(2**31), 2**31, -(2**31) - 1)]
    assert limits == [gl.int32, gl.int32, gl.int64, gl.int64]


HARD_TO_ROUND = [0.0, -0.0, 1.0, 1 / 3, -1e-3, 448.0, 463.9, 464.0, 1e4, 65504.0, 65520.0, 1e30, 2.0**-9, 2.0**-10, 3 * 2.0**-11, 2.0**-24, 2.0**-25, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-11, 17.0, 19.0, float("inf"), float("-inf"), float("nan")]  # fmt: skip


@pytest.mark.parametrize("by_store", [True, False])
@pytest.mark.parametrize(
    ("dtype", "cast"),
    [(gl.float16, torch.float16), (gl.bfloat16, torch.bfloat16), (gl.float8e4nv, torch.float8_e4m3fn)],
    ids=["fp16", "bf16", "fp8"],
)  # fmt: skip
def test_rounding_is_torchs(dtype: Any, cast: torch.dtype, by_store: bool) -> None:
    random = torch.randn(1024 - len(HARD_TO_ROUND), generator=torch.Generator().manual_seed(0))
    source = torch.cat([torch.tensor(HARD_TO_ROUND), random * 100])
    if cast.itemsize == 1:  # torch overflows to NaN, the conversion on the device saturates
        expected = source.clamp(-448, 448).to(cast).float()
    else:
        expected = source.to(cast).float()
    if by_store:
        stored = torch.zeros(1024).to(cast)
        run(kernels.store_masked, from_ptr=source, to_ptr=stored, first=0, kept=1024, N=1024)
        found = stored.float()
    else:
        found = torch.zeros(1024)
        run(kernels.through_registers, from_ptr=source, to_ptr=found, N=1024, DTYPE=dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])


def test_exp2_and_log2_of_integers_are_exact() -> None:
    source = torch.arange(-126.0, 128.0)
    source = torch.nn.functional.pad(source, (0, 2))
    power, back = torch.zeros(256), torch.zeros(256)
    run(kernels.elementary_functions, from_ptr=source, exp2_ptr=power, log2_ptr=back, N=256)
    assert torch.equal(power, torch.ldexp(torch.ones(256), source.int()))
    assert torch.equal(back, source)


TYPES = (gl.int1, gl.int16, gl.int32, gl.int64, gl.float16, gl.bfloat16, gl.float32)


@pytest.mark.parametrize("divides", [True, False])
def test_operations_are_computed_in_the_type_that_triton_computes_them_in(divides: bool) -> None:
    def type_of_triton(left: Any, right: Any, right_is_number: bool) -> Any:
        return TritonSemantic(None).computation_type_impl(
            left, False, right, right_is_number, divides
        )

    for left, right in itertools.product(TYPES, TYPES):
        if not divides or gl.int1 not in (left, right) or left == right:
            tensors = Tensor(None, left), Tensor(None, right)
            assert computed_in(*tensors, divides=divides) == type_of_triton(left, right, False)
    for left, (number, dtype) in itertools.product(TYPES, [(True, gl.int1), (7, gl.int32), (1.5, gl.float32)]):  # fmt: skip
        if not divides or gl.int1 not in (left, dtype) or left == dtype:
            expected = type_of_triton(left, dtype, True)
            assert computed_in(Tensor(None, left), number, divides=divides) == expected
            assert computed_in(number, Tensor(None, left), divides=divides) == expected


# Copies and shared memory.


@pytest.mark.parametrize(("wait", "half"), [(0, 0), (0, 1), (1, 0)])
def test_a_copy_lands_when_its_group_is_waited_for(wait: int, half: int) -> None:
    source, found = torch.randn(2 * N), torch.zeros(N)
    run(kernels.copy_twice, from_ptr=source, to_ptr=found, kept=N, WAIT=wait, READ=half, N=N)
    assert torch.equal(found, source[half * N :][:N])


@pytest.mark.parametrize(("wait", "half"), [(1, 1), (2, 0), (2, 1), (3, 0)])
def test_a_read_before_that_is_a_race(wait: int, half: int) -> None:
    source, found = torch.randn(2 * N), torch.zeros(N)
    with pytest.raises(EmulatorError, match=r"^race in shared memory: fp32\[128\] at byte .* is read"):  # fmt: skip
        run(kernels.copy_twice, from_ptr=source, to_ptr=found, kept=N, WAIT=wait, READ=half, N=N)


def test_a_copy_outside_of_a_group_never_lands() -> None:
    with pytest.raises(EmulatorError, match="race in shared memory"):
        run(kernels.copy_uncommitted, from_ptr=counted(), to_ptr=torch.zeros(N), N=N)


@pytest.mark.parametrize(("by_copy", "what"), [(True, "second copy"), (False, "is stored to")])
def test_nobody_writes_where_a_copy_is_under_way(by_copy: bool, what: str) -> None:
    with pytest.raises(EmulatorError, match=rf"^race .*{what}"):
        run(kernels.write_under_a_copy, from_ptr=counted(), N=N, BY_COPY=by_copy)


def test_masked_lanes_of_a_copy_write_zeros() -> None:
    source, found = torch.randn(2 * N), torch.zeros(N)
    run(kernels.copy_twice, from_ptr=source, to_ptr=found, kept=5, WAIT=0, READ=1, N=N)
    assert torch.equal(found, torch.cat([source[N : N + 5], torch.zeros(N - 5)]))


def test_a_copy_from_outside_of_the_argument_is_refused() -> None:
    with pytest.raises(EmulatorError, match="asynchronous copy of from_ptr at element offset 255"):
        run(kernels.copy_twice, from_ptr=counted(n=255), to_ptr=torch.zeros(N), kept=N, WAIT=0, READ=0, N=N)  # fmt: skip


@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_shared_memory_starts_poisoned(dtype: torch.dtype) -> None:
    found = torch.zeros(N).to(dtype)
    run(kernels.read_unwritten, to_ptr=found, N=N)
    poisoned = found == POISONED_INTEGER if dtype == torch.int32 else found.float().isnan()
    assert poisoned.all()


@pytest.mark.parametrize("slot", [-1, 2])
def test_an_index_past_shared_memory_is_refused(slot: int) -> None:
    with pytest.raises(EmulatorError, match=f"index {slot} of shared memory"):
        run(kernels.index_past_the_end, to_ptr=torch.zeros(N), slot=slot, N=N)


NARROW = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=8, rank=2)


def test_pairs_of_fp8_come_apart_as_even_and_odd_columns() -> None:
    every_code = torch.arange(256, dtype=torch.uint8).repeat(16).view(64, 64)
    source = every_code.view(torch.float8_e4m3fn)
    even, odd = torch.zeros(64, 32).half(), torch.zeros(64, 32).half()
    wide = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    run(kernels.unpair, from_ptr=source, even_ptr=even, odd_ptr=odd, ROWS=64, COLUMNS=64, WIDE=wide, NARROW=NARROW)  # fmt: skip
    torch.testing.assert_close(even, source.half()[:, 0::2], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(odd, source.half()[:, 1::2], rtol=0, atol=0, equal_nan=True)


def test_pairs_under_another_swizzle_are_refused() -> None:
    source, half = torch.zeros(64, 64).to(torch.float8_e4m3fn), torch.zeros(64, 32).half()
    wide = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    with pytest.raises(RefusedProgramError, match="swizzle_byte_width=128"):
        run(kernels.unpair, from_ptr=source, even_ptr=half, odd_ptr=half, ROWS=64, COLUMNS=64, WIDE=wide, NARROW=NARROW)  # fmt: skip


@pytest.mark.parametrize("use_acc", [True, False])
def test_products_of_small_integers_are_exact(use_acc: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-9, 10, (n, 256), generator=generator) for n in (64, 8))
    acc, found = torch.full((64, 8), 0.5), torch.zeros(64, 8)
    run(kernels.multiply, a_ptr=a.bfloat16(), b_ptr=b.bfloat16(), acc_ptr=acc, to_ptr=found, K=256, USE_ACC=use_acc)  # fmt: skip
    assert torch.equal(found, (a @ b.T).float() + 0.5 * use_acc)


def test_a_broken_promise_of_constancy_is_refused() -> None:
    source, found = torch.arange(N) // 4, torch.zeros(N, dtype=torch.int32)
    run(kernels.promise_constancy, from_ptr=source, to_ptr=found, RUN=4, N=N)
    assert torch.equal(found, source.int())
    with pytest.raises(EmulatorError, match=r"max_constancy\(8\)"):
        run(kernels.promise_constancy, from_ptr=source, to_ptr=found, RUN=8, N=N)


# What is no verdict about a kernel: neither may look like a bug that was caught.


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (kernels.mix_layouts, "layout mismatch in add"),
        (kernels.mask_in_another_layout, "layout mismatch in store"),
        (kernels.expand_the_wrong_axis, "expand_dims at 0"),
        (kernels.assert_what_does_not_hold, "N is 3"),
        (kernels.store_another_type, "store of .*int32.* to shared memory fp32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_gluon_refuses_is_refused(kernel: Any, message: str) -> None:
    with pytest.raises(RefusedProgramError, match=message):
        run(kernel, to_ptr=torch.zeros(N, dtype=torch.int32), N=N)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (kernels.take_a_cosine, r"language\.cos"),
        (kernels.run_unknown_assembly, "griddepcontrol.wait;// "),
        (kernels.sort_a_constant, "sorted in sort_a_constant"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_unknown_is_refused_by_name(kernel: Any, message: str) -> None:
    with pytest.raises(UnknownToEvaluatorError, match=message):
        run(kernel, to_ptr=torch.zeros(N), N=N)
    assert not issubclass(UnknownToEvaluatorError, EmulatorError)
    assert not issubclass(RefusedProgramError, EmulatorError)
