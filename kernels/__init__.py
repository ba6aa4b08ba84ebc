"""Triton kernels of LGViT's exit heads.

One file an idea: a kernel, then the launcher that checks its arguments, allocates and launches. A
launcher takes plain tensors; the ops in `lgvit_fast.ops` decide when to call it. Importing this
package does not import Triton; importing one of its modules does.
"""
