"""nn.GRU over a PackedSequence on the CPU, with a backward pass that touches each word once.

PyTorch's own CPU path slices the packed words at every time step, and the gradient of each slice is a zero-filled
tensor as large as all words together; training a bi-GRU of 1024 units spends most of its time filling and adding
those. Here the gradients of a step are written where they belong, and each weight's gradient is one matrix product.
Parameters, formulas and results are nn.GRU's (Cho et al. 2014, in the variant of torch.nn.GRU).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence


class Direction(torch.autograd.Function):
    """One direction of one layer. N words in all, B captions, H units.

    words (N, input size) in PackedSequence order, batch_sizes (list of int), the direction's four parameters →
    outputs (N, H), final state (B, H).
    """

    @staticmethod
    def forward(ctx, words, batch_sizes, backwards, w_ih, w_hh, b_ih, b_hh):
        units = w_hh.shape[1]
        gates = torch.addmm(b_ih, words, w_ih.T)  # (N, 3H): r, z, n; overwritten with their activations
        previous = words.new_empty(len(words), units)  # the state before each word
        hidden_n = words.new_empty(len(words), units)  # W_hn h + b_hn
        outputs = words.new_empty(len(words), units)
        state = words.new_zeros(batch_sizes[0], units)
        steps = list(zip(torch.tensor([0, *batch_sizes]).cumsum(0).tolist(), batch_sizes, strict=False))
        if backwards:
            steps.reverse()
        for start, size in steps:
            at = slice(start, start + size)
            h = previous[at].copy_(state[:size])
            from_h = torch.addmm(b_hh, h, w_hh.T)
            rz = gates[at, : 2 * units].add_(from_h[:, : 2 * units]).sigmoid_()
            r, z = rz[:, :units], rz[:, units:]
            hidden_n[at] = from_h[:, 2 * units :]
            n = gates[at, 2 * units :].addcmul_(r, hidden_n[at]).tanh_()
            torch.lerp(n, h, z, out=state[:size])  # (1 - z) n + z h
            outputs[at] = state[:size]
        ctx.save_for_backward(words, gates, previous, hidden_n, w_ih, w_hh)
        ctx.steps = steps
        return outputs, state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs, d_state):
        words, gates, previous, hidden_n, w_ih, w_hh = ctx.saved_tensors
        units = w_hh.shape[1]
        d_state = d_state.clone()
        d_in = torch.empty_like(gates)  # gradients of what W_ih x + b_ih and, but for r in the last third,
        d_hidden = torch.empty_like(gates)  # W_hh h + b_hh give
        for start, size in reversed(ctx.steps):
            at = slice(start, start + size)
            r, z, n = gates[at].split(units, dim=1)
            d_h = d_state[:size].add_(d_outputs[at])
            d_n = d_h * (1 - z) * (1 - n * n)
            d_in[at, :units] = d_n * hidden_n[at] * r * (1 - r)
            d_in[at, units : 2 * units] = d_h * (previous[at] - n) * z * (1 - z)
            d_in[at, 2 * units :] = d_n
            d_hidden[at, : 2 * units] = d_in[at, : 2 * units]
            d_hidden[at, 2 * units :] = d_n * r
            d_h.mul_(z).addmm_(d_hidden[at], w_hh)
        d_words = d_in @ w_ih if ctx.needs_input_grad[0] else None
        return d_words, None, None, d_in.T @ words, d_hidden.T @ previous, d_in.sum(0), d_hidden.sum(0)


def applies(rnn: torch.nn.GRU, packed: PackedSequence) -> bool:
    """True where packed_gru computes what rnn would: on a CPU, without dropout and mixed precision."""
    return packed.data.device.type == "cpu" and not rnn.dropout and not torch.is_autocast_enabled("cpu")


def packed_gru(rnn: torch.nn.GRU, packed: PackedSequence) -> tuple[PackedSequence, Tensor]:
    """rnn(packed), for an nn.GRU without dropout and a PackedSequence on the CPU.

    Returns the outputs, a PackedSequence, and the final states (layers · directions, B, H) in the captions' order.
    """
    words, sizes = packed.data, packed.batch_sizes.tolist()
    directions = ("", "_reverse") if rnn.bidirectional else ("",)
    states = []
    for layer in range(rnn.num_layers):
        outputs = []
        for suffix in directions:
            weights = [
                getattr(rnn, f"{name}_l{layer}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            output, state = Direction.apply(words, sizes, bool(suffix), *weights)
            outputs.append(output)
            states.append(state)
        words = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
    states = torch.stack(states)
    if packed.unsorted_indices is not None:
        states = states[:, packed.unsorted_indices]
    return PackedSequence(words, *packed[1:]), states
