"""Triton kernels, one op a module. Imported only where Triton is installed."""
