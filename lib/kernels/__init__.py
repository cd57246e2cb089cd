"""What only makes the model faster; without it everything works as it stands in model.py, which checks its numbers.

blocks.py     what model.attend takes: captions in blocks of equal length, or padded and masked
compiled.py   attention compiled by numba, on products that stay in the cache, for scoring on CPUs
gru.py        the GRU's backward pass on CPUs
"""
