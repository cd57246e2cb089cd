"""What makes the model faster. blocks.py arranges what model.attend takes; the others stand in for what model.py says.

blocks.py     what model.attend takes: captions in blocks of equal length, or padded and masked
pieces.py     scoring on CPUs: products that stay in the cache, by attention_kernel.py, compiled by numba
              and used while it gives model.attend's numbers
gru.py        the GRU's backward pass on CPUs
"""
