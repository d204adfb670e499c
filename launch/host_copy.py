"""A few numbers on their way from a device to the host."""

import torch
from torch import Tensor


class HostCopy:
    """Numbers that are copied to the host while the device goes on, and read when they have long arrived.

    initial: (…) float32 on the host, what is read before the first copy.
    """

    def __init__(self, initial: Tensor, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.device = device
        self._values = initial.pin_memory() if on_gpu else initial.clone()
        self._copied = torch.cuda.Event() if on_gpu else None

    @property
    def shape(self) -> torch.Size:
        """Shape of the numbers."""
        return self._values.shape

    def start(self, values: Tensor) -> None:
        """Begin to copy values of this shape from the device."""
        self._values.copy_(values, non_blocking=True)
        if self._copied:
            self._copied.record()

    def read(self) -> Tensor:
        """Return the values on the host. Waits until the last copy has happened."""
        if self._copied:
            self._copied.synchronize()
        return self._values
