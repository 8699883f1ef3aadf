"""Copies between the host and a device for which the host does not wait."""

from __future__ import annotations

import time

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on `device`. Page-locked first: other memory's copy waits for the stream."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """Tensors on their way to the host, queued behind the work that makes them.

    They can be read while later work runs. A copy that is queued when they are read, as `.item()` and `.tolist()` do,
    comes after all that was queued until then.
    """

    def __init__(self, *tensors: Tensor) -> None:
        """All on one device."""
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # torch takes page-locked memory
        self._arrival = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once they are there."""
        if self._event is not None:
            self._event.synchronize()
            self._event, self._arrival = None, time.perf_counter()
        return self._tensors

    @property
    def arrival(self) -> float:
        """When the host had them, by `time.perf_counter`: on a GPU the end of the first `wait`."""
        return self._arrival
