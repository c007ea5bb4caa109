"""Layers on a CUDA device: one Triton kernel per file, and the decoder layers made of them.

Imports nothing here: `sequences.py` needs torch alone, every kernel file needs Triton. Without a GPU the
kernels run, slowly and exactly, in Triton's interpreter (TRITON_INTERPRET=1 before the import).
"""
