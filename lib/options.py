"""The options of a run: their names, defaults and meaning."""

from typing import Any

# Options that SCAN's and PFAN's published checkpoints lack, with what they mean where they are missing.
NEW_OPTIONS = {
    "position": "attention",
    "allow_empty_captions": False,
    "amp": False,
    "matmul_precision": "highest",
    "device": "auto",
    "seed": 0,
    "mean_warmup_epochs": 0,
    "need_box_whole": False,  # this and the next: the whole-image variant's
    "lambda_whole": 1.0,
}


def option(opt: Any, name: str) -> Any:
    """opt.name, or its default where opt (any object, such as an older checkpoint's options) lacks it."""
    return getattr(opt, name, NEW_OPTIONS[name]) if name in NEW_OPTIONS else getattr(opt, name)
