"""One command for a machine with a GPU: every figure that only a GPU can give, row by row, in one json.

make gpu-check
"""
