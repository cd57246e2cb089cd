"""What only makes the model faster; without it everything works as it stands in model.py, which checks its numbers.

blocks.py     what model.attend takes: captions in blocks of equal length, or padded and masked
pieces.py     scoring on CPUs: products that stay in the cache, by attention_kernel.py, compiled by numba
gru.py        the GRU's backward pass on CPUs
"""
