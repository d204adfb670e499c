"""Augmentation: per-image crop, flip and RandAugment or 3-Augment ops; random erasing, mixup and cutmix of batches."""
