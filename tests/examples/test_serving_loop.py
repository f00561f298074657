"""examples/serving_loop.py: the program, its pages, and that its own check sees what can go wrong around a paged cache."""

from __future__ import annotations

import ast
import io
import random
import re
import tokenize
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from example_programs import EXAMPLES, is_readable, load, run

from patune.kernels.inputs import DecodeInputs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

toy = load("toy_layer")  # before the loop, which imports it
loop = load("serving_loop")
ALL_PAGES = list(range(1, loop.PAGES))
MOST_CODE_LINES = 65
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(source: str) -> set[int]:
    """The lines that are not blank, a comment or a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {n for t in tokens if t.type not in NO_CODE for n in range(t.start[0], t.end[0] + 1)}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return code


def test_it_is_read_in_two_minutes() -> None:
    source = (EXAMPLES / "serving_loop.py").read_text()
    code = code_lines(source)
    assert 40 < len(code) <= MOST_CODE_LINES
    lines = source.splitlines()
    assert max(len(lines[number - 1]) for number in code) <= 100, "few, not long"


def test_code_lines_are_counted() -> None:
    source = '"""A\n\nB."""\n\n# why\nx = (\n    1,  # one\n)\n\n\ndef f():\n    """C."""\n    # why\n    return """D\n\nE"""\n'
    assert code_lines(source) == {6, 7, 8, 11, 14, 15, 16}


def numbers(output: str) -> dict[str, Any]:
    """What the program printed."""
    found = re.search(
        r"^(?P<sequences>\d+) sequences, (?P<tokens>\d+) tokens decoded \((?P<how>.*)\)\n"
        r"largest error (?P<error>[\d.]+) \(tolerance (?P<tolerance>[\d.]+)\), pages lost: (?P<lost>-?\d+)\n\Z",
        output,
        re.MULTILINE,
    )
    assert found is not None, output
    return {k: v if k == "how" else float(v) for k, v in found.groupdict().items()}


@pytest.mark.parametrize(
    ("gpu", "how"),
    [(False, "oracle, no GPU"), pytest.param(True, "CUDA graphs", marks=pytest.mark.gpu)],
)
def test_the_program_serves_and_checks_itself(tmp_path: Path, gpu: bool, how: str) -> None:
    done = run("serving_loop", folder=tmp_path, gpu=gpu)
    assert done.returncode == 0, done.stderr
    assert is_readable(done.stdout)
    said = numbers(done.stdout)
    assert (said["sequences"], said["how"], said["lost"]) == (16, how, 0)
    assert said["tolerance"] == toy.TOLERANCE
    assert said["tokens"] > 100
    assert 0 <= said["error"] < toy.TOLERANCE
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU, eight pages, and four of them for a sequence: some wait for rows, some for pages."""
    monkeypatch.setattr(toy, "detect_target", lambda: None)
    monkeypatch.setattr(loop, "PAGES", 9)
    monkeypatch.setattr(loop, "CONTEXT", 192)


def requests(seed: int, count: int = 12) -> list[Any]:
    chance = random.Random(seed)
    some = []
    for _ in range(count):
        prompt = chance.choices(range(toy.VOCABULARY), k=chance.choice((1, 5, 60, 64, 65, 150)))
        length = len(prompt) + chance.randint(0, 20)
        some.append(toy.Sequence(prompt, len(prompt), length))
    return some


def worst_error(server: Any, served: list[Any]) -> float:
    return max(toy.error_of(server.layer, sequence) for sequence in served)


def check_pages(server: Any, running: list[Any]) -> None:
    """Every page is free or has one holder, and nobody holds the spare page."""
    held = [page for sequence in running for page in sequence.pages]
    assert sorted(held + server.free) == list(range(1, 9))
    for s in running:
        assert len(s.pages) == -(-s.length // loop.BLOCK_SIZE)
        assert [s.slots[i] for i in (0, 5, s.length - 1)] == [
            s.pages[i // 64] * 64 + i % 64 for i in (0, 5, s.length - 1)
        ]


@pytest.mark.parametrize("seed", range(3))
def test_sequences_join_and_finish_at_different_times(small: None, seed: int) -> None:
    server, asked = loop.Server(toy.ToyLayer()), requests(seed)
    seen: list[list[Any]] = []
    batches: list[int] = []

    def recorded(batch: int) -> None:
        count = int((server.inputs[2, :batch] > 0).sum())
        running = [s for s in asked if s.pages and len(s.tokens) <= s.length]
        assert len(running) == count
        check_pages(server, running)
        seen.append(running)
        batches.append(batch)
        server.step(batch)

    server.run = recorded
    server.serve(list(asked))
    assert sorted(server.free) == list(range(1, 9))
    for s in asked:
        steps = [number for number, running in enumerate(seen) if s in running]
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert len(s.tokens) == s.length + 1 == s.prompt_tokens + len(steps)
    begins = {next(n for n, running in enumerate(seen) if s in running) for s in asked}
    assert len(begins) > 3
    assert batches == [next(n for n in (1, 2, 4, 8) if n >= len(running)) for running in seen]
    assert any(batch > len(running) for batch, running in zip(batches, seen, strict=True))
    assert worst_error(server, asked) < 0.01


def test_a_request_that_never_fits_is_refused(small: None) -> None:
    with pytest.raises(ValueError, match="empty"):
        loop.Server(toy.ToyLayer()).serve([toy.Sequence([1, 2], 2, 600)])


def test_exact_logits_are_those_of_attention(small: None) -> None:
    layer, tokens = toy.ToyLayer(), [5, 9, 5, 300, 17]
    hidden = layer.embedding[tokens].float()
    query = (hidden @ layer.to_query.float()).view(5, 2, 4, 128).bfloat16().float()
    key, value = ((hidden @ w.float()).view(5, 2, 128).bfloat16().float() for w in layer.to_keys_values)  # fmt: skip
    for last in range(5):
        scores = torch.einsum("hgd,thd->hgt", query[last], key[: last + 1]) * 128**-0.5
        out = torch.einsum("hgt,thd->hgd", scores.softmax(-1), value[: last + 1])
        exact = out.flatten() @ layer.to_logits.float()
        torch.testing.assert_close(
            layer.exact_logits(tokens)[last], exact, atol=0.02 * float(exact.abs().max()), rtol=0
        )


def test_an_error_is_how_much_a_token_fell_short(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor([[0, 0, 9.0], [0, 4, 2], [-5, 1, 0], [0, 9, 0]])
    monkeypatch.setattr(toy.ToyLayer, "exact_logits", lambda layer, tokens: logits[: len(tokens)])
    layer = toy.ToyLayer()
    assert toy.error_of(layer, toy.Sequence([0, 0, 1, 1], 2, 3)) == 0
    assert toy.error_of(layer, toy.Sequence([0, 0, 2, 1], 2, 3)) == 0.5
    assert toy.error_of(layer, toy.Sequence([0, 0, 1, 0], 2, 3)) == pytest.approx(6 / 5)


class Sticky(list[int]):
    """A free list that hands a page out and keeps it."""

    def pop(self, index: Any = -1) -> int:
        page = super().pop(index)
        self.insert(0, page)
        return page


def faulty(fault: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server with one thing that goes wrong around a paged cache."""
    server = loop.Server(toy.ToyLayer())
    step = server.step

    def before(change: Any) -> None:
        server.run = lambda batch: (change(batch), step(batch))

    if fault == "page_twice":
        server.free = Sticky(server.free)
    if fault == "spare_page":  # handed out: padding writes into it
        server.free.append(0)
    if fault == "padding":  # writes into a page of somebody
        before(lambda batch: server.inputs[1].masked_fill_(server.inputs[2] == 0, 8 * 64))
    if fault == "slot":  # in the page, but not its place
        before(lambda batch: server.inputs[1].bitwise_xor_(1))
    if fault == "prompt":
        monkeypatch.setattr(toy.ToyLayer, "keys_values", lambda layer, tokens, right=toy.ToyLayer.keys_values: right(layer, tokens) * (1 - isinstance(tokens, list)))  # fmt: skip
    if fault == "context":
        before(lambda batch: server.inputs[2].sub_(1))
    if fault == "table":  # of the row beside it
        before(lambda batch: server.block_tables.copy_(server.block_tables.roll(1, 0)))
    if fault == "graph":  # of one row, whatever the batch
        server.run = lambda batch: step(1)
    return server


@pytest.mark.parametrize(
    "fault", ["page_twice", "spare_page", "padding", "slot", "prompt", "context", "table", "graph"]
)
def test_its_check_sees(fault: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    server, asked = faulty(fault, monkeypatch), requests(3)
    server.serve(list(asked))
    monkeypatch.undo()
    assert worst_error(server, asked) > 2 * toy.TOLERANCE


@pytest.mark.parametrize(("fault", "lost", "code"), [("", 0, 0), ("", 1, 1), ("slot", 0, 1)])
def test_the_exit_code_is_that_of_the_check(
    fault: str,
    lost: int,
    code: int,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = faulty(fault, monkeypatch)
    server.free = server.free[lost:]
    monkeypatch.setattr(loop, "Server", lambda layer: server)
    monkeypatch.setattr(loop, "random_requests", lambda count, longest: requests(3, 4))
    assert loop.main() == code
    said = numbers(capsys.readouterr().out)
    assert (said["sequences"], said["lost"]) == (4, lost)
    assert (said["error"] > toy.TOLERANCE) == bool(fault)


def test_requests_fit() -> None:
    some = toy.random_requests(200, 384)
    assert [s.prompt_tokens for s in some] == [len(s.tokens) for s in some]
    assert all(1 <= s.prompt_tokens <= s.length <= 384 for s in some)
    assert loop.CONTEXT % loop.BLOCK_SIZE == 0
    assert loop.CONTEXT <= loop.BLOCK_SIZE * (loop.PAGES - 1)
    assert loop.BATCH_SIZES[-1] == loop.ROWS


class FakeGraph:
    """A CUDA graph that runs its step again: what a capture records on a GPU."""

    step: Any = None

    def replay(self) -> None:
        self.step()


def test_graphs_decode_what_the_eager_loop_decodes(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors of the CPU: what is captured, which graphs are replayed for how many rows, and what is decoded then."""
    eager, expected = loop.Server(toy.ToyLayer()), requests(4)
    eager.serve(list(expected))
    server, served = loop.Server(toy.ToyLayer()), requests(4)
    step, calls, capturing = server.step, [], []
    warmed: list[Any] = []
    sized: list[Any] = []

    def recorded(batch: int) -> None:
        if capturing:
            assert not server.inputs[2].any(), "captured on padding"
            capturing[0].step = lambda: (calls.append(("replayed", batch)), step(batch))
        calls.append(("captured" if capturing else "eager", batch))
        step(batch)

    @contextmanager
    def graph(graph: FakeGraph, pool: Any) -> Iterator[None]:
        assert pool == "the pool"
        capturing.append(graph)
        yield
        capturing.clear()

    monkeypatch.setattr(server, "step", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(loop.patune, "warmup", lambda keys: warmed.extend(keys))
    monkeypatch.setattr(loop, "workspace_for", lambda *key, device: sized.append(key) or torch.empty(4))  # fmt: skip
    server.capture()
    assert calls == [(how, n) for n in (8, 4, 2, 1) for how in ("eager", "captured")]
    assert [workload.batch for _, workload in warmed] == [1, 2, 4, 8]
    assert sized == [warmed[-1]]
    assert server.workspace.numel() == 4
    # what is warmed is the very problem that the loop's tensors pose
    posed = posed_by(server)
    assert {problem for problem, _ in warmed} == {posed.problem}
    assert {(w.kv_heads, w.context) for _, w in warmed} == {(toy.KV_HEADS, posed.workload(None).context)}  # fmt: skip
    calls.clear()
    server.serve(list(served))
    lives = [(s.length + 1 - s.prompt_tokens) for s in served]
    assert {how for how, _ in calls} == {"replayed"}
    assert {n for _, n in calls} >= {2, 4, 8}
    assert sum(n for _, n in calls) > sum(lives), "padded"
    assert [s.tokens for s in served] == [s.tokens for s in expected]
    assert torch.equal(server.cache[:, 64:], eager.cache[:, 64:])


def posed_by(server: Any) -> Any:
    """The inputs of a step of all rows, as the kernel gets them."""
    seen: list[Any] = []

    def decode(*tensors: Any, out: Any, workspace: Any, softmax_scale: float) -> Any:
        names = ("query", "key_cache", "value_cache", "block_tables", "context_lengths")
        seen.append(DecodeInputs(**dict(zip(names, tensors, strict=True)), softmax_scale=softmax_scale))  # fmt: skip
        assert workspace is server.workspace
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.patune, "paged_attention_decode", decode)
        loop.Server.step(server, loop.ROWS)
    return seen[0]
