"""Functional execution of compiled gfx942/gfx950 kernels, and static facts of a build."""
