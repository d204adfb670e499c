"""Which images, in which order: WebDataset shards → batches on the training device.

fashion_mnist.py writes a class folder to start with. pack.py makes shards of any: source.py finds the images in
folders, archives (archives.py) and WebDatasets, image_checks.py looks at each, shard_writer.py writes a shard, journal.py
knows which are finished. verify.py checks them, show.py draws them. index.py knows what they hold and in which order
it is seen, shards.py reads them; fetch.py fetches them from far away, prefetch.py says which, cache_folder.py keeps
them. params.py says how each image is looked at, with policies.py's operations; pipeline.py is the graph that does it
and dali_ops.py a part of that (these two alone import DALI), decode.py feeds it, loader.py hands out batches,
augment.py mixes them; parity.py sets the recipes beside timm's. files.py writes files and folders that are whole or
absent, workers.py spreads a command's work over processes, progress.py shows how far it is.
"""
