"""The packs in the package: canonical, measured on the part they are named after, and usable by this version's kernels."""

from __future__ import annotations

import pytest

from patune.configs.dispatcher import PACKS
from patune.configs.packs import load_pack, pack_document, pack_text, read_pack
from patune.kernels.feasibility import is_feasible

SHIPPED = sorted(PACKS.rglob("*.json"))


def test_there_are_some() -> None:
    assert [path.relative_to(PACKS).as_posix() for path in SHIPPED] == [
        "sm_90/nvidia_h200.json",
        "sm_90/nvidia_h200_nhd.json",
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_pack_is_usable(path: object) -> None:
    pack = load_pack(path)
    assert pack_text(pack_document(pack.winners, pack.candidates)) == path.read_text()
    for winner in pack.winners:
        beside = [candidate.knobs for candidate in pack.candidates[winner.key]]
        assert 1 <= len(set(beside)) == len(beside)  # another machine can try them
        assert winner.knobs not in beside
        assert winner.speedup.ratio >= 1.0  # over the default, in turns; a tie is exactly 1
        assert winner.target.arch == path.parent.name
        device, layout = (
            winner.target.device_name.lower().replace(" ", "_"),
            winner.problem.kv_layout,
        )
        assert path.stem == (device if layout == "aiter" else f"{device}_{layout}")
        assert winner.evidence == "measured"
        assert is_feasible(winner.knobs, winner.problem, winner.target) is None


def test_the_large_batch_winner_is_near_the_read_ceiling() -> None:
    """(1024, 128, 8) bf16 at batch 128 x context 4096: at least 92 % of the read bandwidth measured in the same run."""
    (winner,) = (
        w
        for w in read_pack(SHIPPED[0])
        if (w.problem.head_dim, w.problem.qg, w.workload.batch) == (128, 8, 128)
    )
    assert winner.timing is not None
    assert winner.timing.read_fraction >= 0.92
