"""Gluon paged-attention decode kernels, their knobs and feasibility, the reference oracle, and the launch path."""
