"""Kernels in C for a decoder step on a CPU: built on first use, called through ctypes, optional."""
