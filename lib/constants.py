"""Sizes and constants that the published data files and models share."""

N_REGIONS = 36  # regions of an image
SPLIT_SIZE = 16  # rows, and columns, of cells that an image is cut into
N_CELLS = SPLIT_SIZE**2  # cell indices are 0…255, column · 16 + row; 256 is "no cell"
N_SLOTS = 15  # cells that a region keeps
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")  # words with the ids 0…3
LEAK = 0.1  # slope of the clipped norms below 0
