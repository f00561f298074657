"""A serving loop around ``patune.paged_attention_decode``, with a paged KV cache and CUDA graphs: to read in two minutes, and to copy.

Sequences join when there is a row and enough pages for them, decode one token per step and finish at different times. The layer that they run,
their prompts and the check of what was decoded are in ``toy_layer.py``. Without a GPU the same steps run eagerly, on patune's oracle.

    python examples/serving_loop.py

Exits 1 when a token is wrong or a page is lost.
"""

from __future__ import annotations

import torch
from toy_layer import HEAD_DIM, KV_HEADS, QG, Sequence, ToyLayer, random_requests, report

import patune
from patune.kernels.decode import workspace_for

BLOCK_SIZE, PAGES, CONTEXT = 64, 25, 384  # tokens per page, pages, most tokens of a sequence
BATCH_SIZES, ROWS = (1, 2, 4, 8), 8  # a graph each: a batch is padded to the next of them


class Server:
    """The cache, its free pages, and a decode step over static buffers."""

    def __init__(self, layer: ToyLayer) -> None:
        # Page 0 is never handed out: rows that pad a batch write their K and V there.
        self.layer, self.free = layer, list(range(1, PAGES))
        # keys and values by slot: page * BLOCK_SIZE + place in the page
        self.cache = layer.zeros(2, PAGES * BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        # A graph keeps the addresses that it was captured with, so all steps read and write these. Zeros are a batch of padding.
        self.inputs = layer.zeros(3, ROWS, dtype=torch.int32)  # tokens, slots, context lengths
        self.block_tables = layer.zeros(ROWS, CONTEXT // BLOCK_SIZE, dtype=torch.int32)
        self.out = layer.zeros(ROWS, KV_HEADS * QG, HEAD_DIM)
        self.workspace: torch.Tensor | None = None
        self.run = self.step  # eagerly, until there are graphs

    def step(self, batch: int) -> None:
        """Decode the first rows: the next tokens take the place of the last. Nothing reads a value back or waits, so all of it can be captured."""
        tokens, slots, context_lengths = self.inputs[:, :batch]
        self.cache[:, slots] = self.layer.keys_values(tokens)
        # both as [pages, kv_heads, block_size, head_dim]: the strides say the rest
        keys, values = self.cache.view(2, PAGES, BLOCK_SIZE, KV_HEADS, HEAD_DIM).transpose(2, 3)
        out = patune.paged_attention_decode(
            self.layer.queries(tokens), keys, values, self.block_tables[:batch], context_lengths,
            softmax_scale=HEAD_DIM**-0.5, out=self.out[:batch], workspace=self.workspace,
        )  # fmt: skip
        tokens.copy_(self.layer.next_tokens(out))

    def capture(self) -> None:
        """Compile and load the kernels of every batch size, then record a graph of each."""
        problem = patune.Problem(block_size=BLOCK_SIZE, head_dim=HEAD_DIM, qg=QG, kv_layout="nhd")
        loads = [patune.Workload(batch=n, kv_heads=KV_HEADS, context=CONTEXT) for n in BATCH_SIZES]
        patune.warmup((problem, load) for load in loads)
        # scratch of one call: one is enough for all graphs, which run in turn
        self.workspace = workspace_for(problem, loads[-1], device=self.layer.device)
        pool = torch.cuda.graph_pool_handle()
        graphs = {batch: torch.cuda.CUDAGraph() for batch in BATCH_SIZES}
        for batch in reversed(BATCH_SIZES):  # the others fit into the memory of the largest
            self.step(batch)  # first calls load and allocate, which a capture cannot
            with torch.cuda.graph(graphs[batch], pool=pool):
                self.step(batch)
        self.run = lambda batch: graphs[batch].replay()

    def serve(self, queue: list[Sequence]) -> None:
        """Decode until nobody waits or runs."""
        running: list[Sequence] = []
        while queue or running:
            # Join, with the pages of a whole life: nobody is thrown out halfway for want of one.
            while queue and len(running) < ROWS and queue[0].length <= BLOCK_SIZE * len(self.free):
                running.append(s := queue.pop(0))
                s.pages = [self.free.pop() for _ in range(0, s.length, BLOCK_SIZE)]
                s.slots = [page * BLOCK_SIZE + i for page in s.pages for i in range(BLOCK_SIZE)]
                # K and V of the prompt; its last token is left to the first step
                self.cache[:, s.slots[: len(s.tokens) - 1]] = self.layer.keys_values(s.tokens[:-1])
            # Decode. No size fits nobody: a request larger than all pages ends here, in a ValueError.
            batch = min(n for n in BATCH_SIZES if n >= len(running) > 0)
            rows = [(s.tokens[-1], s.slots[len(s.tokens) - 1], len(s.tokens)) for s in running]
            # padding writes to slot 0, and a context of 0 gives zeros without a look at the cache
            rows += [(0, 0, 0)] * (batch - len(running))
            self.inputs[:, :batch].copy_(torch.tensor(rows).T)
            for row, s in enumerate(running):  # what a table has behind its pages is never read
                self.block_tables[row, : len(s.pages)].copy_(torch.tensor(s.pages))
            self.run(batch)
            # Finish. The host waits for the step here.
            for s, token in zip(tuple(running), self.inputs[0].tolist(), strict=False):
                s.tokens.append(token)
                if len(s.tokens) > s.length:
                    self.free += s.pages
                    running.remove(s)


def main() -> int:
    """Serve random requests and check them; returns the exit code."""
    server, requests = Server(ToyLayer()), random_requests(16, CONTEXT)
    if server.layer.device.type == "cuda":
        server.capture()
    server.serve(list(requests))
    return report(server.layer, requests, lost_pages=PAGES - 1 - len(server.free))


if __name__ == "__main__":
    raise SystemExit(main())
