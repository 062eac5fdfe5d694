"""Parts of a memory that are kept on the host: the archive of everything read, and keys of retrieval heads."""
