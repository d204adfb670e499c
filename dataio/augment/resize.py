"""Antialiased resize of uint8 images on the CPU by PyTorch, called from the DALI graph of pipeline.py.

PyTorch vectorizes PIL's own fixed-point arithmetic. From 500×375 to 224² it takes an eighth of the time of DALI's
fn.resize on one core, and is ten times closer to PIL; launch/benchmark/results/data-cpu.json shows the effect on whole
batches.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import from_numpy


class Resizer:
    """Resizes the images of a batch, each to its own size, in threads that live as long as this object.

    interpolation: "bicubic" or "bilinear", with antialiasing.
    """

    def __init__(self, interpolation: str, threads: int) -> None:
        self._interpolation = interpolation
        self._fault: str | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")  # PyTorch releases the GIL

    def __call__(
        self, images: list[npt.NDArray[np.uint8]], sizes: list[npt.NDArray[np.float32]]
    ) -> list[npt.NDArray[np.uint8]]:
        """Resize images, each (H, W, 3) uint8, to (height, width) of `sizes`; within 2 levels of PIL."""
        try:
            return list(self._pool.map(self._resize, images, sizes))
        except Exception as error:  # DALI raises an error of its own, the same as for a bad image
            self._fault = f"{type(error).__name__}: {error}"
            raise

    def check(self) -> None:
        """Raise RuntimeError if a resize failed, which is the host's fault and not the image's."""
        if self._fault:
            raise RuntimeError(
                f"cannot resize images on the CPU: {self._fault}; free some memory, or use fewer threads (data.threads,"
                " --threads)"
            )

    def _resize(self, image: npt.NDArray[np.uint8], size: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        height, width = (int(side) for side in size)
        channels_last = from_numpy(image)[None].permute(0, 3, 1, 2)  # a view; the result has this layout too
        resized = F.interpolate(channels_last, (height, width), mode=self._interpolation, antialias=True)
        result: npt.NDArray[np.uint8] = resized.permute(0, 2, 3, 1)[0].numpy()
        return result
