"""Windows scaled on the CPU: a part of pipeline.py's graph that DALI leaves to Python.

PyTorch has PIL's own arithmetic for bytes in vector instructions. At 500×375 → 224² it takes an eighth of the time of
DALI's fn.resize on one core, and is ten times nearer to PIL; launch/benchmark/results/data-cpu.json has what that
means for whole batches.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch.nn.functional as F
from torch import from_numpy


class Resizer:
    """Scales the images of a batch, each to a size of its own, in threads that live as long as this object.

    interpolation: "bicubic" or "bilinear", with antialiasing.
    """

    def __init__(self, interpolation: str, threads: int) -> None:
        self._interpolation = interpolation
        self._fault: str | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")  # PyTorch lets go of the interpreter

    def __call__(self, images: list[np.ndarray], sizes: list[np.ndarray]) -> list[np.ndarray]:
        """The images in (height, width) of `sizes`; each (H, W, 3) uint8, and within 2 levels of PIL's."""
        try:
            return list(self._pool.map(self._resize, images, sizes))
        except Exception as error:  # DALI makes an error of its own of it, as of a broken image
            self._fault = f"{type(error).__name__}: {error}"
            raise

    def check(self) -> None:
        """Raises RuntimeError if images could not be scaled, which is no fault of theirs."""
        if self._fault:
            raise RuntimeError(
                f"cannot scale images on the CPU: {self._fault}; free some memory, or use fewer threads (data.threads,"
                " --threads)"
            )

    def _resize(self, image: np.ndarray, size: np.ndarray) -> np.ndarray:
        height, width = (int(side) for side in size)
        channels_last = from_numpy(image)[None].permute(0, 3, 1, 2)  # as it lies there, and so the result
        scaled = F.interpolate(channels_last, (height, width), mode=self._interpolation, antialias=True)
        return scaled.permute(0, 2, 3, 1)[0].numpy()
