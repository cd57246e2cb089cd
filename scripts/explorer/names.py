"""Short names of models, for the explorer's columns and a figure's legend."""

import os

from lib.options import option

LABELS = {"attention": "PFAN-A", "area": "PFAN-P", "none": "SCAN"}


def name_models(paths, options):
    """A name for each checkpoint: its kind, with the folder and then the file where two names are equal.

    paths: list of str; options: the opt of each.
    """
    names = [f"{LABELS[option(opt, 'position')]} {opt.cross_attn}" for opt in options]
    for part in (lambda path: os.path.basename(os.path.dirname(os.path.abspath(path))), os.path.basename):
        if len(set(names)) < len(names):
            names = [f"{name} · {part(path)}" for name, path in zip(names, paths, strict=True)]
    return names
