"""How batches are taken apart, from vLLM's own description of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", reason="vLLM is not installed")

from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend
from vllm_steps import LAYERS, Shape, Step

from patune.errors import UnsupportedProblemError
from patune.integrations.vllm_backend import PatuneBackend
from patune.integrations.vllm_metadata import PatuneMetadata


def counts(batch: PatuneMetadata) -> tuple[int, int, list[tuple[int, int]]]:
    return (
        batch.decodes,
        batch.query_length,
        [(piece.tokens.start, piece.tokens.stop) for piece in batch.pieces],
    )


@pytest.mark.parametrize(
    ("speculated", "sequences", "expected"),
    [
        (0, [(20, 1), (63, 1)], (2, 1, [])),
        (0, [(0, 1)], (1, 1, [])),
        (0, [(0, 9)], (0, 1, [(0, 9)])),
        (0, [(20, 1), (63, 1), (5, 7), (0, 9)], (2, 1, [(2, 18)])),
        (2, [(20, 3), (63, 3)], (2, 3, [])),
        (2, [(20, 1), (63, 1)], (2, 1, [])),
        (2, [(20, 3), (63, 2), (70, 3)], (1, 3, [(3, 8)])),
        (2, [(20, 1), (63, 3)], (1, 1, [(1, 4)])),
        (2, [(20, 3), (0, 9)], (1, 3, [(3, 12)])),
    ],
)
def test_the_split(
    speculated: int,
    sequences: list[tuple[int, int]],
    expected: tuple[int, int, list[tuple[int, int]]],
) -> None:
    assert counts(Step(Shape(speculated=speculated), sequences).metadata()) == expected


def test_padded_sequences_are_decoded_and_never_gathered() -> None:
    shape = Shape(speculated=2)
    step = Step(shape, [(20, 3), (63, 3)], padded_sequences=3, padded_tokens=15)
    assert counts(step.metadata()) == (5, 3, [])
    step = Step(shape, [(20, 3), (0, 9)], padded_sequences=3, padded_tokens=20)
    assert counts(step.metadata()) == (1, 3, [(3, 12)])
    assert step.metadata().pieces[0].key_lengths.tolist() == [9]


def test_a_batch_with_an_empty_sequence_inside_is_not_decoded_as_rows() -> None:
    """Row b of the query would not be sequence b's."""
    step = Step(Shape(), [(20, 1), (30, 0), (63, 1)])
    assert counts(step.metadata()) == (0, 1, [(0, 2)])
    torch.testing.assert_close(step.run()[0].float(), step.expected(), rtol=8e-3, atol=4e-3)


def test_a_piece_of_two_sequences() -> None:
    step = Step(Shape(), [(20, 1), (15, 4), (0, 33)])
    (piece,) = step.metadata().pieces
    first, second = step.table[1, :2].tolist(), step.table[2, :3].tolist()
    assert piece.pages.tolist() == first + second
    assert piece.cu_query.tolist() == [0, 4, 37]
    assert piece.cu_key.tolist() == [0, 32, 80]
    assert piece.key_lengths.tolist() == [19, 33]
    assert (piece.max_query, piece.max_key) == (33, 48)
    assert piece.cu_query.dtype == piece.cu_key.dtype == torch.int32


def test_decode_reads_vllms_own_buffers() -> None:
    """A graph that captured them sees what vLLM writes into them later."""
    step = Step(Shape(), [(20, 1), (63, 1)])
    batch = step.metadata()
    assert batch.context_lengths.data_ptr() == step.common.seq_lens.data_ptr()
    assert batch.block_tables.data_ptr() == step.common.block_table_tensor.data_ptr()
    assert batch.context_lengths.dtype == batch.block_tables.dtype == torch.int32


@pytest.mark.parametrize(("longest", "bound"), [(1, 1), (2, 2), (64, 64), (65, 128), (4096, 4096)])
def test_the_context_bound_is_a_power_of_two(longest: int, bound: int) -> None:
    step = Step(Shape(), [(20, 1)])
    step.common.max_seq_len = longest
    assert step.metadata().max_context == bound


@pytest.mark.parametrize("causal", [False, torch.tensor([True, False])])
def test_batches_that_are_not_causal_are_refused(causal: bool | torch.Tensor) -> None:
    step = Step(Shape(), [(20, 1)])
    step.common.causal = causal
    with pytest.raises(UnsupportedProblemError, match=r"not causal.*FLASH_ATTN"):
        step.metadata()


def test_vllm_can_copy_the_fields_into_its_own_subclass() -> None:
    """It does so for fast prefill of layers that share a cache."""
    step = Step(Shape(), [(20, 1), (0, 9)])
    backend = create_fast_prefill_custom_backend("Fast", PatuneBackend)
    builder = backend.get_builder_cls()(
        step.shape.spec, LAYERS, step.shape.config(), torch.device("cpu")
    )
    step.common.logits_indices_padded = torch.tensor([0, 9])
    step.common.num_logits_indices = 2
    step.common.max_logits_per_req = 1
    batch = builder.build(0, step.common)
    assert isinstance(batch, PatuneMetadata)
    names = {field.name for field in dataclasses.fields(PatuneMetadata)}
    assert names <= set(vars(batch))
    assert batch.num_logits_indices == 2
