"""Our files: the weights of a sparse model, and the metadata that rebuilds it."""
