"""Running an augmented model: reading, decoding by a graph, generating, and faster forms of the base's modules."""
