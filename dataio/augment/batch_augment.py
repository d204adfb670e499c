"""What is done to whole batches on the training device: random erasing, mixup, cutmix, label smoothing.

timm's own classes do the work. They draw from the global generators of Python, NumPy and PyTorch, so these are
seeded for the length of a call, and then put back: for erasing from (seed, position) of each image, for mixing from
(seed, group), a group being `mixup_group_size` positions of the run. So images and targets are bit-identical on any number of
ranks, whatever ran before. All this takes 2 ms for 64 images of 32² on one CPU core.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing

from dataio.options import Count, Fraction, NonNegative, Options
from dataio.sampler import draws_at

if TYPE_CHECKING:
    from dataio.loader import Batch


class BatchAugmentOptions(Options):
    """How whole batches are augmented; the defaults are the official recipe."""

    reprob: Fraction = 0.25  # probability of erasing a rectangle of an image
    mixup: NonNegative = 0.8  # alpha of the Beta distribution of the shares; 0 turns mixup off
    cutmix: NonNegative = 1.0  # likewise
    mixup_prob: Fraction = 1.0  # probability of mixing a group of images
    mixup_switch_prob: Fraction = 0.5  # probability of cutmix for a mixed group, where both are on
    mixup_group_size: Annotated[Count, Field(multiple_of=2)] = (
        128  # images that share the draws of mixing, in pairs: the authors' batch per GPU
    )
    label_smoothing: Fraction = 0.1

    @property
    def mixup_active(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def check_even_batch(options: BatchAugmentOptions, batch: int) -> None:
    """Raises ValueError if images are to be mixed and `batch`, of a rank and micro-step, is odd."""
    if options.mixup_active and batch % 2:
        raise ValueError(
            f"a batch of {batch} images per rank cannot be mixed in pairs; use {batch + 1},"
            " or set mixup and cutmix to 0"
        )


class BatchAugment:
    """Call it with a batch for (images, targets). The images are the batch's, changed in place.

    Neighbours are mixed: the image at position 2p of the run with that at 2p + 1. timm takes the first and the last of
    a batch, and so on; in random order any pairs are as good.
    images: (B, 3, S, S) float32. targets: (B, num_classes) float32, rows sum to 1. `batch`: images per call.
    Raises as `check_even_batch` does.
    """

    def __init__(
        self, options: BatchAugmentOptions, num_classes: int, seed: int, batch: int, device: torch.device
    ) -> None:
        check_even_batch(options, batch)
        self.options, self.num_classes, self.seed = options, num_classes, seed
        self._erase = RandomErasing(1.0, mode="pixel", max_count=1, device=device)
        self._erase_seed = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])  # crops have draws of `seed`
        self._mix = Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            prob=options.mixup_prob,
            switch_prob=options.mixup_switch_prob,
            label_smoothing=options.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, batch: "Batch") -> tuple[torch.Tensor, torch.Tensor]:
        chances = draws_at(self._erase_seed, batch.position, len(batch.images), 4)[:, 0]
        with _preserved_rng_state(batch.images.device) as seed_rng:
            for index in np.flatnonzero(chances < self.options.reprob):
                seed_rng((self._erase_seed, batch.position + int(index)))
                self._erase(batch.images[index])
            if self.options.mixup_active:
                return batch.images, self._mix_groups(batch, seed_rng)
        return batch.images, mixup_target(batch.labels, self.num_classes, smoothing=self.options.label_smoothing)

    def _mix_groups(self, batch: "Batch", seed_rng: Callable[[tuple[int, int]], None]) -> torch.Tensor:
        """Mixes the images in place; the targets. A batch may begin and end within a group."""
        targets = []
        for group, places in _groups(batch.position, len(batch.images), self.options.mixup_group_size):
            seed_rng((self.seed, group))
            images = batch.images[places]
            mixed, mixed_targets = self._mix(_pair_neighbours(images), _pair_neighbours(batch.labels[places]))
            images.copy_(_unpair_neighbours(mixed))
            targets.append(_unpair_neighbours(mixed_targets))
        return torch.cat(targets)


def _groups(first: int, count: int, size: int) -> Iterator[tuple[int, slice]]:
    """The groups of `size` positions that these positions lie in, each with their places in the batch."""
    for group in range(first // size, (first + count - 1) // size + 1):
        yield group, slice(max(group * size - first, 0), min((group + 1) * size - first, count))


def _pair_neighbours(rows: torch.Tensor) -> torch.Tensor:
    """Neighbours where timm mixup_active them: the first of each pair from the start on, the second from the end."""
    return torch.cat([rows[0::2], rows[1::2].flip(0)])


def _unpair_neighbours(rows: torch.Tensor) -> torch.Tensor:
    """What `_pair_neighbours` was given."""
    return torch.stack([rows[: len(rows) // 2], rows[len(rows) // 2 :].flip(0)], dim=1).flatten(0, 1)


@contextmanager
def _preserved_rng_state(device: torch.device) -> Iterator[Callable[[tuple[int, int]], None]]:
    """Inside, the function that this gives seeds the global generators; afterwards they are as they were.

    Nothing here waits for the device: the state of a CUDA generator is kept on the host.
    """
    on_gpu = device.type == "cuda"
    torch_generator = torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
    states = random.getstate(), np.random.get_state(), torch_generator.get_state()

    def seed_rng(key: tuple[int, int]) -> None:
        words = np.random.SeedSequence(key).generate_state(4)
        random.seed(int.from_bytes(words.tobytes(), "little"))
        np.random.seed(words)
        torch_generator.manual_seed(int(words[0]) << 32 | int(words[1]))

    try:
        yield seed_rng
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch_generator.set_state(states[2])
