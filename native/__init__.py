"""The optional kernels in C, built by `python -m native.build`. Nothing is imported before it is asked for."""
