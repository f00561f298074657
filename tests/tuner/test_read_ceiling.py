from __future__ import annotations

import pytest
import torch

from patune.tuner import read_ceiling
from patune.tuner.read_ceiling import (
    LADDER_B,
    LADDER_PER_CU,
    WORD_B,
    ColdRead,
    ReadLadder,
    ladder_shapes,
    measure_read_ladder,
)
from patune.tuner.rotation import COLD_B

MB = 1_000_000


def cold_read(nbytes, us):
    return ColdRead(nbytes=nbytes, median_us=us, block=1024, unroll=1, warps=8, programs=132)


LADDER = ReadLadder((cold_read(1 * MB, 2.0), cold_read(3 * MB, 3.0), cold_read(10 * MB, 5.0)))


@pytest.mark.parametrize(
    ("nbytes", "us"),
    [
        (1000, 2.0),  # never less than the smallest
        (1 * MB, 2.0),
        (2 * MB, 2.5),
        (3 * MB, 3.0),
        (10 * MB, 5.0),
        (30 * MB, 15.0),  # at the bandwidth of the largest
    ],
)
def test_cold_reads_are_interpolated_in_bytes(nbytes, us):
    assert LADDER.cold_read_us(nbytes) == pytest.approx(us)


def test_the_ceiling_is_the_best_bandwidth_and_the_ladder_survives_json():
    assert LADDER.ceiling_gb_s == pytest.approx(2000.0)  # 10 MB in 5 us
    assert ReadLadder.from_dict(LADDER.to_dict()) == LADDER


@pytest.mark.parametrize("nbytes", LADDER_B)
def test_every_size_has_shapes_that_read_every_byte_once(nbytes):
    shapes = list(ladder_shapes(nbytes, 132))
    assert len(shapes) >= 8
    assert len(set(shapes)) == len(shapes)
    for block, unroll, _, programs in shapes:
        steps = nbytes // (WORD_B * block * unroll)
        assert steps * WORD_B * block * unroll == nbytes
        assert 1 <= programs <= steps
    assert nbytes // WORD_B < 2**31  # the kernel's size argument is an int32


def test_the_ladder_takes_the_fastest_shape_and_times_it_again(monkeypatch):
    sizes = (1 << 20, 1 << 22)
    launched, replays = [], []

    class Kernel:
        def __getitem__(self, grid):
            def launch(words, out, n, **constants):
                launched.append((words.data_ptr(), n, grid[0], constants["BLOCK"]))
                assert out.numel() >= grid[0]

            return launch

    class Recording:
        def __init__(self, steps, warm_up_us):
            assert len({step.__self__.arguments["x_ptr"].data_ptr() for step in steps}) == len(
                steps
            )
            nbytes = steps[0].__self__.arguments["n"] * WORD_B
            assert len(steps) * nbytes >= COLD_B // 100
            self.call = steps[0].__self__
            self.replays = 0

        def replay_us(self):
            self.call.launch()
            self.replays += 1
            replays.append(self)
            best = self.call.constants["BLOCK"] == 2048 and self.call.grid[0] == 2
            lucky = 0.5 if best and self.replays <= read_ceiling.REPLAYS else 0.0
            return 10.0 - 5.0 * best - lucky

    properties = type("Properties", (), {"multi_processor_count": 2})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(read_ceiling, "COLD_B", COLD_B // 100)
    monkeypatch.setattr(
        read_ceiling, "_random_words", lambda b: torch.zeros(b // WORD_B, dtype=torch.int32)
    )
    monkeypatch.setattr(read_ceiling, "record", Recording)
    monkeypatch.setattr("patune.kernels.read_ceiling.read_sum_kernel", Kernel())
    ladder = measure_read_ladder(sizes)
    assert [read.nbytes for read in ladder.reads] == list(sizes)
    for read in ladder.reads:
        assert (read.block, read.programs, read.median_us) == (2048, 2, 5.0)
    assert len(replays) == sum(
        read_ceiling.REPLAYS * len(list(ladder_shapes(size, 2))) + read_ceiling.LADDER_REPLAYS
        for size in sizes
    )
    assert {words for words, *_ in launched}
    assert max(LADDER_PER_CU) * 2 >= max(programs for *_, programs, _ in launched)
