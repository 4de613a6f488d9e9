"""Attention over the paged cache in Triton."""
