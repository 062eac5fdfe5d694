"""Runs an augmented model: prefill, decoding by a CUDA graph, generation, and faster forms of the base's modules."""
