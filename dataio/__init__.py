"""Which images, in which order: WebDataset shards → batches on the training device.

pack.py writes shards, verify.py checks them, index.py knows what they hold and in which order it is seen,
pipeline.py decodes (the only file that imports DALI), loader.py hands out batches, augment.py mixes them.
"""
