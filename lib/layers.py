"""Linear layers as SCAN starts them, and weight-normalised ones under the parameter names of its checkpoints."""

import torch
import torch.nn.functional as F
from torch import nn


def linear(in_features: int, out_features: int) -> nn.Module:
    """A linear layer with Xavier-uniform weights and zero bias."""
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class WeightNormLinear(nn.Module):
    """A linear layer whose weight is weight_g · weight_v / ‖weight_v‖, one length for the whole matrix."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(out_features, in_features)))
        self.weight_g = nn.Parameter(self.weight_v.detach().norm())
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "weight_g" in state_dict:  # PyTorch 0.3 stored the length as one element, not as a scalar
            state_dict[prefix + "weight_g"] = state_dict[prefix + "weight_g"].reshape(())
        super()._load_from_state_dict(state_dict, prefix, *args)
