"""The kernels in Numba for NVIDIA GPUs: same names and signatures as `slidex.kernels.reference`."""
