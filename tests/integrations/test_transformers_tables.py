"""Block tables of a step, against tables written down by hand and an enumeration of rings."""

from __future__ import annotations

import itertools

import pytest
import torch

from patune.integrations.transformers_tables import (
    StepTables,
    from_block_table,
    from_ring,
    from_slots,
    rounded_pages,
)

PAGE = 4
PAGES = ([5, 2, 9], [7], [1, 3])  # of three sequences
TRASH = 44


def slot(pages: list[int], token: int) -> int:
    return pages[token // PAGE] * PAGE + token % PAGE


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rows_of(tables: StepTables) -> list[list[int]]:
    """Of each sequence, the slots of its tokens in the tables' order."""
    found = []
    for row, length in zip(
        tables.block_tables.tolist(), tables.context_lengths.tolist(), strict=True
    ):
        found.append([row[t // PAGE] * PAGE + t % PAGE for t in range(length)])
    return found


def test_from_slots() -> None:
    lengths = (10, 1, 8)
    cu_key = int32(0, 10, 11, 19)
    read = [slot(p, t) for p, n in zip(PAGES, lengths, strict=True) for t in range(n)]
    write = [slot(p, n - 1) for p, n in zip(PAGES, lengths, strict=True)]
    tables = from_slots(torch.tensor(read), torch.tensor(write), cu_key, 10, block_size=PAGE)
    assert tables.block_tables.tolist() == [[5, 2, 9], [7, 0, 0], [1, 3, 0]]
    assert tables.block_tables.dtype == tables.context_lengths.dtype == torch.int32
    assert tables.context_lengths.tolist() == list(lengths)
    assert tables.slots.tolist() == [9 * 4 + 1, 7 * 4, 3 * 4 + 3]


def test_from_a_block_table_with_padding() -> None:
    table = int32(5, 2, 9, 7, -1, -1, 1, 3, -1, -1, -1, -1).view(4, 3)
    cu_key = int32(0, 9, 13, 18, 18)
    tables = from_block_table(table, cu_key, block_size=PAGE, trash=TRASH)
    assert tables.context_lengths.tolist() == [9, 4, 5, 0]
    assert tables.slots.tolist() == [9 * 4, 7 * 4 + 3, 3 * 4, TRASH]


@pytest.mark.parametrize("window", [1, 3, 4, 6, 8, 11, 12])
def test_a_ring_holds_exactly_its_window(window: int) -> None:
    """All lengths around the window's wraps, three sequences at a time."""
    for start in range(1, 4 * window):
        lengths = (start, start + window, start + 2 * window + 1)
        read, write, held, expected = [], [], [0], []
        for pages, length in zip(PAGES_OF_RINGS, lengths, strict=True):
            past = length - 1
            kept = min(past, window - 1)
            by_age = range(past - kept, past)
            read += [slot(pages, t % window) for t in by_age] + [-1]
            write.append(slot(pages, past % window))
            held.append(held[-1] + kept + 1)
            expected.append({slot(pages, t % window) for t in range(max(0, length - window), length)})  # fmt: skip
        tables = from_ring(
            torch.tensor(read), torch.tensor(write), int32(*held), max(b - a for a, b in itertools.pairwise(held)),
            torch.tensor(lengths) - 1, block_size=PAGE, window=window,
        )  # fmt: skip
        found = rows_of(tables)
        assert [set(row) for row in found] == expected
        assert [len(row) for row in found] == [min(n, window) for n in lengths]
        assert tables.slots.tolist() == write


PAGES_OF_RINGS = ([5, 2, 9], [7, 4, 8], [1, 3, 6])


def test_widths_are_few_and_near() -> None:
    assert [rounded_pages(n) for n in (1, 2, 15, 16, 17, 33, 130)] == [1, 2, 15, 16, 18, 36, 144]
    for pages in range(1, 5000):
        assert pages <= rounded_pages(pages) <= pages * 1.125 + 1
    assert len({rounded_pages(n) for n in range(1, 5000)}) < 100
