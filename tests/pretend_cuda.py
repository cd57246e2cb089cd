"""A simulated CUDA device: its tensors say cuda:0, and the CPU computes their values.

    with pretend_cuda() as log:
        model = SCAN(opt)          # opt.device = "cuda:0"
        model.train_emb(*batch)    # log.launches, log.waits, log.sent

Autograd and autocast see CUDA's dispatch keys. Operations on tensors of both devices fail as on CUDA. Launches of
kernels, waits of the host for the device and bytes copied to the device are noted. torch's FakeTensorMode has no
values, and neither backward() nor nn.GRU works in it.
"""

import collections
import contextlib
import os
import traceback
from unittest import mock

import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from lib.kernels.gru import Direction

CUDA = torch.device("cuda", 0)
# Operations that launch nothing, beside views
SILENT = set(
    "empty empty_like empty_strided new_empty new_empty_strided detach _unsafe_view alias lift_fresh _reshape_alias "
    "resize_".split()
)
INDEXING = set("index index_put_ index_put _index_put_impl_ _unsafe_index _unsafe_index_put".split())
# Operations after which the host waits, because their result, or its size, decides what comes next
WAITING = set("_local_scalar_dense nonzero masked_select equal unique_consecutive _unique2".split())
PACKING = set("_pack_padded_sequence _pad_packed_sequence".split())  # take lengths on the CPU


def is_cuda(device):
    """True for cuda and for meta, which the C++ side takes these tensors' device for."""
    return device is not None and torch.device(device).type in ("cuda", "meta")


def on_cuda(values):
    return tree_map(lambda x: Pretend(x) if isinstance(x, torch.Tensor) and not isinstance(x, Pretend) else x, values)


def on_cpu(values):
    return tree_map(lambda x: x.inner if isinstance(x, Pretend) else x, values)


class Pretend(torch.Tensor):
    """A tensor of the simulated device. inner: its values, on the CPU."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        with _disable_current_modes():
            shape = torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device="meta")
            tensor = torch.Tensor._make_subclass(cls, shape, requires_grad, device_for_backend_keys=CUDA)
        tensor.inner = inner
        return tensor

    device = property(lambda self: CUDA)
    is_cuda, is_cpu, is_meta = True, False, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_):
        return f"Pretend({tuple(self.shape)}, {self.dtype}, cuda:0)"

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        LOG.wait("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return LOG.run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sends operations on the simulated device, and those that create tensors there, to LOG."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(x, Pretend) for x in tree_leaves((args, kwargs))) or is_cuda(kwargs.get("device")):
            return LOG.run(func, args, kwargs)
        return func(*args, **kwargs)


class Log:
    """Computes the operations of the simulated device.

    launches: number of each operation. waits: what for, and the line. sent: bytes copied to the device. free: free
    memory that torch.cuda.mem_get_info reports. fails(bytes): whether a result of this size is out of memory.
    """

    def __init__(self):
        self.quiet, self.free, self.fails = False, 70 << 30, lambda n_bytes: False
        self.reset()

    def reset(self):
        self.launches, self.waits, self.sent = collections.Counter(), [], 0

    def wait(self, reason):
        if self.quiet:
            return
        place = "?"
        for frame in traceback.extract_stack():
            path = os.path.relpath(frame.filename, ROOT)
            if not path.startswith((".", "tests/pretend_cuda")):
                place = f"{path}:{frame.lineno} {frame.line}"
        self.waits.append(f"{reason} at {place}")

    def launch(self, func):
        name, returns = func._schema.name.partition("::")[2], func._schema.returns
        view = not func._schema.is_mutable and returns and returns[0].alias_info is not None
        if not self.quiet and name not in SILENT and not view:
            self.launches[name] += 1

    @contextlib.contextmanager
    def silence(self):
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    def run(self, func, args, kwargs):
        """The result of an operation with at least one argument, or its result, on the simulated device."""
        name = func._schema.name.partition("::")[2]
        if func is torch.ops.prim.device.default:
            return CUDA
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with Mode():
                return func.decompose(*args, **kwargs)
        if name == "_to_copy":
            return self.to_copy(func, args[0], kwargs)
        if name == "copy_" and isinstance(args[0], Pretend) != isinstance(args[1], Pretend):
            return self.copy_(*args[:2], non_blocking=len(args) > 2 and args[2])
        self.refuse_mixed_devices(name, args, kwargs)
        if name in WAITING:
            self.wait(name)
        kwargs_on_cpu = on_cpu(kwargs)
        if is_cuda(kwargs.get("device")):
            kwargs_on_cpu["device"] = torch.device("cpu")
        with _disable_current_modes():
            result = func(*on_cpu(args), **kwargs_on_cpu)
        self.launch(func)
        if name == "_local_scalar_dense":
            return result
        if name in PACKING:
            return Pretend(result[0]), result[1]
        if self.fails(sum(x.nbytes for x in tree_leaves(result) if isinstance(x, torch.Tensor))):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if torch.is_inference_mode_enabled():
            return args[0] if func._schema.is_mutable else on_cuda(result)
        return return_and_correct_aliasing(func, args, kwargs, on_cuda(result))

    def to_copy(self, func, source, kwargs):
        starts_there = isinstance(source, Pretend)
        ends_there = starts_there if kwargs.get("device") is None else is_cuda(kwargs["device"])
        options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
        if starts_there != ends_there:
            if not (ends_there and kwargs.get("non_blocking")):
                self.wait("copy to the device" if ends_there else "copy to the host")
            self.sent += source.nbytes * ends_there
        if starts_there or ends_there:
            self.launch(func)
        with _disable_current_modes():
            copy = func(source.inner if starts_there else source, device=torch.device("cpu"), **options)
        return Pretend(copy) if ends_there else copy

    def copy_(self, target, source, non_blocking):
        ends_there = isinstance(target, Pretend)
        if not (ends_there and non_blocking):
            self.wait("copy_")
        self.sent += source.nbytes * ends_there
        with _disable_current_modes():
            on_cpu(target).copy_(on_cpu(source))
        return target

    def refuse_mixed_devices(self, name, args, kwargs):
        """Raise RuntimeError for an argument on the CPU where CUDA's kernel does."""
        if name in PACKING:
            return
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(isinstance(x, Pretend) for x in leaves):
            return
        indices = [x for x in args[1] if x is not None] if name in INDEXING else []
        for x in leaves:
            is_index = any(x is index for index in indices)
            if isinstance(x, Pretend):
                if is_index and x.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{name} with a mask")
            elif is_index:
                self.wait(f"{name} with an index on the CPU")
            elif x.dim() or name in ("mm", "bmm", "addmm"):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"({name}, {tuple(x.shape)})"
                )


LOG = Log()
T = torch.Tensor
LOW = {F.linear, torch.matmul, T.matmul, T.__matmul__, T.__rmatmul__, torch.mm, T.mm, torch.bmm, T.bmm, torch.addmm}
HIGH = {torch.softmax, T.softmax, F.softmax, T.norm, torch.norm, torch.linalg.vector_norm, T.sum, torch.sum, T.pow}
HIGH |= {torch.logsumexp, T.logsumexp}


class Autocast(TorchFunctionMode):
    """CUDA's autocast: the C++ side takes these tensors for meta ones and leaves them alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cuda") and func in LOW | HIGH:
            dtype = torch.get_autocast_dtype("cuda") if func in LOW else torch.float32
            args, kwargs = tree_map(
                lambda x: x.to(dtype) if isinstance(x, Pretend) and x.is_floating_point() else x, (args, kwargs)
            )
        return func(*args, **kwargs)


class CudnnDirection(Direction):
    """One direction of cuDNN's packed GRU: one call forwards, one backwards."""

    @staticmethod
    def forward(ctx, *args):
        LOG.launches["cudnn_rnn"] += 1
        with LOG.silence():
            return Direction.forward(ctx, *args)

    @staticmethod
    def backward(ctx, *args):
        LOG.launches["cudnn_rnn_backward"] += 1
        with LOG.silence():
            return Direction.backward(ctx, *args)


def cudnn_gru(data, batch_sizes, hx, weights, has_biases, num_layers, dropout, train, bidirectional):
    """torch._VF.gru of packed sequences. Under autocast cuDNN computes in float16."""
    if not isinstance(data, Pretend):
        return torch._C._VariableFunctions.gru(
            data, batch_sizes, hx, weights, has_biases, num_layers, dropout, train, bidirectional
        )
    if not all(isinstance(x, Pretend) for x in (hx, *weights)):
        raise RuntimeError("Input, hidden and parameter tensors are not at the same device")
    if isinstance(batch_sizes, Pretend):
        raise RuntimeError("batch_sizes should always be on CPU")
    half = torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", enabled=False):
        words, states, n_directions = data.float() if half else data, [], 1 + bidirectional
        for layer in range(num_layers):
            outputs = []
            for direction in range(n_directions):
                parameters = weights[4 * (layer * n_directions + direction) :][:4]
                output, state = CudnnDirection.apply(words, batch_sizes.tolist(), bool(direction), *parameters)
                outputs.append(output)
                states.append(state)
            with LOG.silence():
                words = torch.cat(outputs, 1)
        with LOG.silence():
            states = torch.stack(states)
        return (words.half(), states.half()) if half else (words, states)


@contextlib.contextmanager
def pretend_cuda():
    """In here a CUDA device is there, cuda:0. Yields the LOG of its operations."""
    LOG.__init__()
    simulated = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (LOG.free, 80 << 30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
    }
    with contextlib.ExitStack() as stack:
        for name, function in simulated.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for place, name, value in (
            (torch.backends.cudnn, "is_acceptable", lambda x: False),
            (torch.nn.RNNBase, "flatten_parameters", lambda self: None),
            (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None),
            (torch.serialization, "location_tag", lambda storage: "cuda:0"),
            (torch.Tensor, "pin_memory", lambda self, *_: self),
            (torch.accelerator, "is_available", lambda *_: False),  # of the DataLoader's own pinning
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        torch._VF.gru = cudnn_gru
        stack.callback(lambda: delattr(torch._VF, "gru"))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(Mode())
        stack.enter_context(Autocast())
        yield LOG
