"""Memory: the layers of a model, their buffers, the cache and its file, and what is kept on the host."""
