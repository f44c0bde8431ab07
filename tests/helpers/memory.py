"""Measures memory that PyTorch holds."""

import gc
import json
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def saved_bytes(model: torch.nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd saves for the backward pass of `call()`, without parameters; tensors that
    share memory count once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()  # keeps the graph and its saved tensors alive
    del kept
    return sum(sizes.values())


def allocator_peak(call, path) -> int:
    """The most bytes that PyTorch's CPU allocator held during `call()`, beyond those before it. The
    profiler writes its trace to `path`."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"]
              if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
