"""Serving engines that run patune's kernels: one module each, which imports its engine inside ``register()``.

:mod:`~patune.integrations.layers` refuses what the kernels do not compute, :mod:`~patune.integrations.varlen` is the prefill beside the decode.
"""
