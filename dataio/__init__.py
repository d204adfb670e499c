"""Which images, in which order: WebDataset shards → batches on the training device.

fashion_mnist.py writes a class folder to start with, source.py finds and checks the images of any, pack.py makes
shards of them, verify.py checks those, index.py knows what they hold and in which order it is seen. recipes.py draws
what is done to an image, operations.py does it and pipeline.py decodes (these two alone import DALI), loader.py hands
out batches, augment.py mixes them. files.py writes files and folders that are whole or absent, workers.py spreads a
command's work over processes.
"""
