"""fastattn inside of other libraries: transformers, and torch's own attention function."""
