"""Waits are checked in the text: no register is used that an outstanding load may still write."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from asm_snippets import kernel_text
from gluon_kernels import compile_async_sum, compile_decode, compile_dot, compile_softmax

from patune.emulator import Program
from patune.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Callable

ARCHS = ["gfx942", "gfx950"]
WAIT = re.compile(r"\n\ts_waitcnt ([^\n]*)")


def finding(body: str) -> str | None:
    """What is said of a body; None when it may run."""
    try:
        Program(kernel_text(body, ["ptr"], "gfx950"), 1024)
    except EmulatorError as error:
        return str(error)
    return None


def missing(body: str) -> tuple[str, str] | None:
    """(register, wait) of the finding."""
    message = finding(body)
    if message is None:
        return None
    match = re.fullmatch(
        r"instruction `.*` uses (\w+), which `.*` may still be loading: no s_waitcnt (\w+\(\d+\)) in between\.",
        message,
    )
    assert match is not None, message
    return match[1], match[2]


def lines(text: str) -> str:
    """A body written with semicolons."""
    return "\n".join(part.strip() for part in text.split(";"))


G = "global_load_dword {}, v20, s[4:5]".format
B = "buffer_load_dwordx4 {}, v20, s[8:11], 0 offen".format
D = "ds_read_b32 {}, v20".format
S = "s_load_dwordx2 {}, s[0:1], 0x0".format
STORE = "global_store_dword v20, v30, s[4:5]"
WRITE = "ds_write_b32 v20, v30"
COPY = "buffer_load_dword v20, s[8:11], 0 offen lds"


def test_the_message_names_both_instructions_the_register_and_the_wait() -> None:
    body = f"{B('v[0:3]')}\ns_waitcnt vmcnt(1)\nv_add_f32_e32 v1, v2, v3"
    assert finding(body) == (
        "instruction `v_add_f32_e32 v1, v2, v3` uses v1, which `buffer_load_dwordx4 v[0:3], v20, s[8:11], 0 offen` "
        "may still be loading: no s_waitcnt vmcnt(0) in between."
    )


@pytest.mark.parametrize(
    ("load", "use", "register", "wait"),
    [
        (G("v1"), "v_mov_b32_e32 v5, v1", "v1", "vmcnt(0)"),  # read
        (G("v1"), "v_mov_b32_e32 v1, v5", "v1", "vmcnt(0)"),  # overwritten
        (B("v[4:7]"), "v_add_f32_e64 v1, |v2|, -v7", "v7", "vmcnt(0)"),  # source modifiers
        (B("a[4:7]"), "v_accvgpr_read_b32 v4, a6", "a6", "vmcnt(0)"),
        (G("v1"), "global_store_dword v20, v1, s[4:5]", "v1", "vmcnt(0)"),  # stored
        (G("v20"), G("v2"), "v20", "vmcnt(0)"),  # an address
        (G("v1"), D("v1"), "v1", "vmcnt(0)"),  # loaded again, by another queue
        (D("v1"), G("v1"), "v1", "lgkmcnt(0)"),
        ("scratch_load_dword v1, off, off", "v_readfirstlane_b32 s6, v1", "v1", "vmcnt(0)"),
        ("global_load_short_d16 v1, v20, s[4:5]", "global_load_short_d16_hi v1, v20, s[4:5]", "v1", "vmcnt(0)"),
        (D("v1"), "ds_write_b32 v1, v2", "v1", "lgkmcnt(0)"),
        (D("v1"), "ds_read_u16_d16_hi v1, v20", "v1", "lgkmcnt(0)"),  # keeps the other half
        ("ds_read2_b32 v[2:3], v20 offset1:1", "v_mov_b32_e32 v3, 0", "v3", "lgkmcnt(0)"),
        ("ds_read_b64_tr_b16 v[2:3], v20", "v_mov_b32_e32 v4, v2", "v2", "lgkmcnt(0)"),
        ("ds_bpermute_b32 v1, v20, v21", "v_mov_b32_e32 v4, v1", "v1", "lgkmcnt(0)"),
        ("ds_permute_b32 v1, v20, v21", "v_mov_b32_e32 v4, v1", "v1", "lgkmcnt(0)"),
        ("ds_swizzle_b32 v1, v20 offset:swizzle(SWAP,16)", "v_mov_b32_e32 v4, v1", "v1", "lgkmcnt(0)"),
        (S("s[6:7]"), "s_add_u32 s12, s7, 1", "s7", "lgkmcnt(0)"),
        (S("s[6:7]"), "v_mov_b32_e32 v1, s6", "s6", "lgkmcnt(0)"),
        (S("s[6:7]"), S("s[6:7]"), "s6", "lgkmcnt(0)"),  # scalar loads have no order
        (S("s[4:5]"), STORE, "s4", "lgkmcnt(0)"),
        (S("vcc"), "s_cbranch_vccz .LEND\n.LEND:", "vcc_hi", "lgkmcnt(0)"),
        (S("vcc"), "v_div_fmas_f32 v1, v2, v3, v4", "vcc_hi", "lgkmcnt(0)"),
        (S("vcc"), "v_cndmask_b32_e32 v1, v2, v3, vcc", "vcc_hi", "lgkmcnt(0)"),
        (G("v1"), "v_mfma_f32_16x16x16_f16 v[4:7], v[0:1], v[2:3], 0", "v1", "vmcnt(0)"),
        (G("v1"), "v_permlane32_swap_b32_e32 v2, v1", "v1", "vmcnt(0)"),
        (G("v1"), "v_mov_b32_dpp v2, v1 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf", "v1", "vmcnt(0)"),
        (G("v1"), COPY.replace("v20", "v1"), "v1", "vmcnt(0)"),
    ],
)  # fmt: skip
def test_a_use_needs_its_wait(load: str, use: str, register: str, wait: str) -> None:
    assert missing(f"{load}\n{use}") == (register, wait)
    other = "vmcnt(0)" if wait.startswith("lgkm") else "lgkmcnt(0)"
    assert missing(f"{load}\ns_waitcnt {other}\n{use}") == (register, wait)
    assert missing(f"{load}\ns_barrier\n{use}") == (register, wait)  # is no wait
    for enough in (wait, f"{wait} {other}", "0"):
        assert finding(f"{load}\ns_waitcnt {enough}\n{use}") is None


@pytest.mark.parametrize(
    "body",
    [
        f"{G('v1')}; {G('v1')}",  # lands in order
        f"{G('v1')}; scratch_load_dword v1, off, off",
        f"{D('v1')}; ds_bpermute_b32 v1, v20, v21",
        f"{G('v1')}; v_mov_b32_e32 v20, 0",  # an address is read when the load is issued
        f"{STORE}; v_mov_b32_e32 v30, 0",  # and so is what is stored
        f"{WRITE}; v_mov_b32_e32 v30, 0",
        f"{COPY}; v_mov_b32_e32 v20, 0",
        S("s[0:1]"),
        f"{G('v1')}; s_nop 0",
        G("v1"),  # never used
        f"{B('v[4:7]')}; v_mov_b32_e32 v8, v3; v_accvgpr_write_b32 a4, v3",
        f"{S('s[6:7]')}; v_mov_b32_e32 v6, v7",
    ],
)
def test_what_needs_no_wait(body: str) -> None:
    assert finding(lines(body)) is None


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (f"{G('v1')}; {G('v2')}; s_waitcnt vmcnt(1); v_mov_b32_e32 v1, 0", None),
        (f"{G('v1')}; {G('v2')}; s_waitcnt vmcnt(2); v_mov_b32_e32 v1, 0", ("v1", "vmcnt(1)")),
        (f"{G('v1')}; {G('v2')}; s_waitcnt vmcnt(1); v_mov_b32_e32 v2, 0", ("v2", "vmcnt(0)")),
        # stores and loads to LDS take a place
        (f"{G('v1')}; {STORE}; {COPY}; s_waitcnt vmcnt(2); v_mov_b32_e32 v1, 0", None),
        (f"{G('v1')}; {STORE}; {COPY}; s_waitcnt vmcnt(3); v_mov_b32_e32 v1, 0", ("v1", "vmcnt(2)")),
        # the younger load of a register counts
        (f"{G('v1')}; {G('v2')}; {G('v1')}; s_waitcnt vmcnt(2); v_mov_b32_e32 v1, 0", ("v1", "vmcnt(0)")),
        # LDS operations are no vector memory operations
        (f"{G('v1')}; {WRITE}; s_waitcnt vmcnt(1); v_mov_b32_e32 v1, 0", ("v1", "vmcnt(0)")),
        (f"{D('v1')}; {WRITE}; s_waitcnt lgkmcnt(1); v_mov_b32_e32 v1, 0", None),
        (f"{D('v1')}; {WRITE}; s_waitcnt lgkmcnt(2); v_mov_b32_e32 v1, 0", ("v1", "lgkmcnt(1)")),
        # scalar loads come back in any order
        (f"{S('s[6:7]')}; {S('s[8:9]')}; s_waitcnt lgkmcnt(1); s_mov_b32 s12, s6", ("s6", "lgkmcnt(0)")),
        (f"{D('v1')}; {S('s[6:7]')}; s_waitcnt lgkmcnt(1); v_mov_b32_e32 v1, 0", ("v1", "lgkmcnt(0)")),
        (f"{S('s[6:7]')}; {WRITE}; s_waitcnt lgkmcnt(1); s_mov_b32 s12, s6", ("s6", "lgkmcnt(0)")),
        (f"{D('v1')}; {S('s[6:7]')}; s_waitcnt lgkmcnt(0); v_mov_b32_e32 v1, s6", None),
        # after that, LDS operations have an order again
        (f"{S('s[6:7]')}; s_waitcnt lgkmcnt(0); {D('v1')}; {D('v2')}; s_waitcnt lgkmcnt(1); v_mov_b32_e32 v1, 0", None),
        # the largest value of a field is a wait too
        (";".join([G("v1")] + [STORE] * 63 + ["s_waitcnt vmcnt(63)", "v_mov_b32_e32 v1, 0"]), None),
        (";".join([D("v1")] + [WRITE] * 15 + ["s_waitcnt lgkmcnt(15)", "v_mov_b32_e32 v1, 0"]), None),
        (";".join([D("v1")] + [WRITE] * 14 + ["s_waitcnt lgkmcnt(15)", "v_mov_b32_e32 v1, 0"]), ("v1", "lgkmcnt(14)")),
    ],
)  # fmt: skip
def test_positions_in_the_queues(body: str, found: tuple[str, str] | None) -> None:
    assert missing(lines(body)) == found


USE = "v_mov_b32_e32 v5, v1"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        # a wait on one path only
        (f"{G('v1')}; s_cbranch_scc1 .LJOIN; s_waitcnt vmcnt(0); .LJOIN:; {USE}", ("v1", "vmcnt(0)")),
        (f"{G('v1')}; s_cbranch_scc1 .LJOIN; s_nop 0; .LJOIN:; s_waitcnt vmcnt(0); {USE}", None),
        # a load on one path only
        (f"s_cbranch_scc1 .LJOIN; {G('v1')}; .LJOIN:; {USE}", ("v1", "vmcnt(0)")),
        # the path with fewer younger operations counts
        (f"{G('v1')}; s_cbranch_scc1 .LJOIN; {STORE}; {STORE}; .LJOIN:; {STORE}; s_waitcnt vmcnt(1); {USE}", None),
        (f"{G('v1')}; s_cbranch_scc1 .LJOIN; {STORE}; {STORE}; .LJOIN:; {STORE}; s_waitcnt vmcnt(2); {USE}", ("v1", "vmcnt(1)")),
        # loaded on both, by different queues
        (f"s_cbranch_scc1 .LELSE; {G('v1')}; s_branch .LJOIN; .LELSE:; {D('v1')}; .LJOIN:; s_waitcnt vmcnt(0); {USE}", ("v1", "lgkmcnt(0)")),
        (f"s_cbranch_scc1 .LELSE; {G('v1')}; s_branch .LJOIN; .LELSE:; {D('v1')}; .LJOIN:; s_waitcnt vmcnt(0) lgkmcnt(0); {USE}", None),
        # a scalar load on one path takes the order of the LDS operations away
        (f"{D('v1')}; s_cbranch_scc1 .LJOIN; {S('s[6:7]')}; .LJOIN:; {WRITE}; s_waitcnt lgkmcnt(1); {USE}", ("v1", "lgkmcnt(0)")),
        (f"{D('v1')}; s_cbranch_scc1 .LJOIN; {WRITE}; .LJOIN:; {WRITE}; s_waitcnt lgkmcnt(1); {USE}", None),
        # code that no path reaches, and paths that end
        (f"{G('v1')}; s_branch .LJOIN; {USE}; .LJOIN:; s_nop 0", None),
        (f"{G('v1')}; s_cbranch_scc1 .LJOIN; s_endpgm; {USE}; .LJOIN:; s_nop 0", None),
    ],
)  # fmt: skip
def test_paths(body: str, found: tuple[str, str] | None) -> None:
    assert missing(lines(body)) == found


def loop(before: str, body: str, after: str = "s_nop 0") -> str:
    return lines(f"{before}; .LLOOP:; {body}; s_cbranch_scc1 .LLOOP; {after}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # used at the beginning of the next round
        (loop("s_nop 0", f"{USE}; {G('v1')}"), ("v1", "vmcnt(0)")),
        (loop("s_nop 0", f"s_waitcnt vmcnt(0); {USE}; {G('v1')}"), None),
        (loop("s_nop 0", f"{USE}; {G('v1')}; s_waitcnt vmcnt(0)"), None),
        # the first round has more younger operations than the next ones, or fewer
        (loop(f"{G('v1')}; {STORE}; {STORE}", f"s_waitcnt vmcnt(1); {USE}; {G('v1')}; {STORE}"), None),
        (loop(f"{G('v1')}; {STORE}; {STORE}", f"s_waitcnt vmcnt(2); {USE}; {G('v1')}; {STORE}"), ("v1", "vmcnt(1)")),
        (loop(f"{G('v1')}", f"s_waitcnt vmcnt(1); {USE}; {G('v1')}; {STORE}"), ("v1", "vmcnt(0)")),
        # two stages: this round's wait leaves the load of the next one under way
        (loop(f"{G('v1')}; {G('v2')}", f"s_waitcnt vmcnt(1); {USE}; {G('v1')}; s_waitcnt vmcnt(1); v_mov_b32_e32 v6, v2; {G('v2')}"), None),
        (loop(f"{G('v1')}; {G('v2')}", f"s_waitcnt vmcnt(1); {USE}; {G('v1')}; s_waitcnt vmcnt(2); v_mov_b32_e32 v6, v2; {G('v2')}"), ("v2", "vmcnt(1)")),
        # an inner loop, and a use after both
        (loop(G("v1"), f".LINNER:; {STORE}; s_cbranch_scc0 .LINNER; s_nop 0", f"s_waitcnt vmcnt(1); {USE}"), None),
        (loop(G("v1"), f".LINNER:; {STORE}; s_cbranch_scc0 .LINNER; s_nop 0", f"s_waitcnt vmcnt(2); {USE}"), ("v1", "vmcnt(1)")),
        (loop("s_nop 0", f".LINNER:; {STORE}; s_cbranch_scc0 .LINNER; {G('v1')}", f"s_waitcnt vmcnt(1); {USE}"), ("v1", "vmcnt(0)")),
    ],
)  # fmt: skip
def test_loops(text: str, found: tuple[str, str] | None) -> None:
    assert missing(text) == found


@pytest.mark.parametrize("store", ["ds_write_b32 v1, v2", "ds_write2_b64 v1, v[2:3], v[4:5] offset1:1", "ds_write_b8_d16_hi v1, v2"])  # fmt: skip
def test_stores_to_shared_memory_arrive_before_a_barrier(store: str) -> None:
    found = finding(f"{store}\ns_barrier")
    assert found is not None
    assert f"`s_barrier` uses shared memory, which `{store}` may still be storing to: no s_waitcnt lgkmcnt(0)" in found  # fmt: skip
    assert finding(f"{store}\ns_waitcnt lgkmcnt(0)\ns_barrier") is None
    assert finding(f"{store}\nds_read_b32 v9, v8\ns_waitcnt lgkmcnt(1)\ns_barrier") is None
    assert finding(f"{store}\ns_waitcnt vmcnt(0)\ns_barrier") is not None
    assert finding("ds_read_b32 v9, v8\ns_barrier") is None  # loads may be outstanding


# ---- real builds ----------------------------------------------------------------------------------------------------

BUILDS: dict[str, Callable[[], Any]] = {
    **{f"decode_{arch}": lambda arch=arch: compile_decode(arch, "bf16", 64, 64) for arch in ARCHS},
    **{f"dot_{arch}": lambda arch=arch: compile_dot(arch, "fp16", 16) for arch in ARCHS},
    **{f"softmax_{arch}": lambda arch=arch: compile_softmax(arch) for arch in ARCHS},
    "async_sum": compile_async_sum,
}


@pytest.mark.parametrize("name", BUILDS)
def test_removed_waits_of_a_build_are_noticed(name: str) -> None:
    build = BUILDS[name]()
    asm, shared_b = build.asm["amdgcn"], build.metadata.shared
    Program(asm, shared_b)  # as compiled, it is clean
    noticed = 0
    for match in WAIT.finditer(asm):
        broken = asm[: match.start()] + "\n\ts_nop 0" + asm[match.end() :]
        try:
            Program(broken, shared_b)
        except EmulatorError as error:
            assert re.search("may still be (loading|storing to): no s_waitcnt", str(error))  # noqa: PT017 (some are not needed by registers)
            noticed += 1
        else:
            assert is_for_memory_or_repeated(asm, match)
    assert noticed


def is_for_memory_or_repeated(asm: str, wait: re.Match[str]) -> bool:
    """The wait is for shared memory, before a barrier; or all loads that it is for are waited for again before a branch."""
    counters = set(re.findall(r"(vmcnt|lgkmcnt)\(", wait[1]))
    for line in asm[wait.end() :].split("\n"):
        words = line.split()
        if words[:1] == ["s_barrier"]:
            return True
        if words[:1] == ["s_waitcnt"] and counters <= set(re.findall(r"(\w+)\(0\)", line)):
            return True
        if words and words[0].startswith(("s_cbranch", "s_endpgm")):
            return False
    return False
