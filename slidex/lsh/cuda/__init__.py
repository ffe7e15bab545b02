"""Hash tables on a CUDA device, used by `slidex.lsh.HashIndex` for weights that are there; import the modules."""
