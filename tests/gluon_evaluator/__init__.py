"""A numpy evaluator of the Hopper kernels' source, for a gate without a GPU.

It executes the Python functions under ``@gluon.jit`` with numpy in the place of ``gluon.language``, program after program. So it answers
whether the source computes the problem: addresses, masks, widths, rounding, which copy has landed when.

It does not model threads: barriers and fences have no effect, so that a copy into a slot that other threads still read goes unseen. Nor what
a layout does (only that Gluon's rules for combining them hold), whether ``assert_trivial`` is true, what wgmma asks of shared layouts, its
limited precision in fp8, approximate exp2 and division, and programs that run at once. Whether the source compiles is the compiler's to say.
"""

from gluon_evaluator.executor import EvaluatedExecutor

__all__ = ["EvaluatedExecutor"]
