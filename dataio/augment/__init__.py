"""What changes pixels: crops and flips, the operations of RandAugment and 3-Augment, erasing, mixup and cutmix."""
