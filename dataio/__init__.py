"""Data loading: images → WebDataset shards → DALI batches on the training device, the same on any number of ranks.

What a batch passes through, in order:

- manifest.py: what a packed folder holds, its shards, classes and table of samples.
- sampler.py: shuffled order, from a position in the run to a sample and its random draws.
- shards.py: encoded images of local shards, each checked against the manifest.
- remote/: the same for shards at a URL, which it fetches ahead into a cache on the local disk.
- augment/: everything that changes pixels: crops, flips and ops of single images, mixup and cutmix of batches.
- pipeline.py, decode.py: the DALI graph, and the batches that go through it.
- bad_samples.py: diagnosis, substitutes and budget of undecodable images.
- loader.py: the batches of one rank, in training and in evaluation; loader_state.py: the state to resume from.

Commands: pack/ (`python -m dataio.pack`) writes shards from images, verify.py checks them, show.py draws batches.
Shared: options.py (base of all options), files.py, urls.py, pil.py, workers.py (processes), progress.py.
"""
