"""Benchmarks, both sides in one process: `python -m minillm bench train|generate|tune|align|data|eval|busy`.

Each first checks that both sides compute the same, then times them in turns and prints medians with the versions and
threads they were measured with. On a GPU `train` and `generate` take one side after the other, ours first.
"""
