"""Triton kernels. Importing one imports Triton: `ahn.ops.dispatch` says whether it is there."""
