"""CUDA tensors without data and without a GPU: a shape and a device each (`FakeTensorMode`).

An operation on tensors of two devices raises, and so does one whose result the host would have to
wait for: `.item()`, `nonzero`, a boolean mask as an index.
"""

import contextlib
import ctypes
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
CUDA, META = 1, 14  # indices of c10::DeviceType


@contextlib.contextmanager
def fake_cuda(monkeypatch) -> Iterator[torch.device]:
    """While entered, new tensors are fake, and those on the yielded device are CUDA tensors."""
    monkeypatch.setattr(torch.nn.Module, "_apply", convert_parameters)
    if not torch.cuda.is_available():
        monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: True)
    with no_op_guard(), FakeTensorMode(), SameDeviceIndices():
        yield DEVICE


class SameDeviceIndices(TorchDispatchMode):
    """Raises where a CPU tensor indexes a CUDA tensor; PyTorch would copy it to the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            for index in args[1]:
                if index is not None and index.device != args[0].device:
                    raise RuntimeError(f"an index is on the device {index.device}")
        return func(*args, **(kwargs or {}))


def convert_parameters(module: torch.nn.Module, convert) -> torch.nn.Module:
    """For `module.to(dtype)`: PyTorch's own cannot replace parameters that fake mode watches."""
    for parameter in module.parameters():
        parameter.data = convert(parameter.data)
    return module


@contextlib.contextmanager
def no_op_guard() -> Iterator[None]:
    """Lets PyTorch without CUDA enter the CUDA device: indexing and `copy_` do that."""
    libraries = [*(Path(torch.__file__).parent / "lib").glob("libc10.*")]
    if torch.backends.cuda.is_built():
        yield
        return
    if not libraries:
        pytest.skip("this build of PyTorch has no libc10")
    guards = (ctypes.c_void_p * (META + 1)).in_dll(
        ctypes.CDLL(str(libraries[0])), "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[CUDA] = guards[CUDA], guards[META]
    try:
        yield
    finally:
        guards[CUDA] = before


def backward(loss: torch.Tensor) -> None:
    """`loss.backward()` in Python: PyTorch's own engine asks for the streams of a real GPU."""
    uses, waiting = Counter([loss.grad_fn]), [loss.grad_fn]  # node -> gradients still to come
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in uses:
                waiting.append(node)
            uses[node] += 1
    gradients = defaultdict(dict)  # node -> output -> gradient

    def give(node, output: int, gradient: torch.Tensor | None) -> None:
        if node is None:
            return
        if gradient is not None:
            wanted = node._input_metadata[output]
            assert gradient.device == wanted.device, f"{node} gets a gradient on {gradient.device}"
            gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
            known = gradients[node].get(output)
            gradients[node][output] = gradient if known is None else known + gradient
        uses[node] -= 1
        if uses[node] == 0:
            run(node, gradients.pop(node, {}))

    def run(node, outputs: dict[int, torch.Tensor]) -> None:
        if hasattr(node, "variable"):
            parameter, gradient = node.variable, outputs[0]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            return
        call = getattr(node, "apply", node)  # `apply`: of a torch.autograd.Function
        inputs = call(*(outputs.get(i) for i in range(len(node._input_metadata))))
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        # not strict: an argument that is no tensor has no next function, but a gradient, None
        for (after, output), gradient in zip(node.next_functions, inputs, strict=False):
            give(after, output, gradient)

    give(loss.grad_fn, 0, torch.ones_like(loss))
