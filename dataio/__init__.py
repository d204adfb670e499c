"""Data from images to batches on the training device, through WebDataset shards.

A batch passes manifest.py (contents of a packed folder), sampler.py (order and random draws), shards.py (encoded
images), decode.py (batches; bad_samples.py substitutes undecodable images), pipeline.py (DALI graph) and loader.py
(batches of one rank, and the state of the run).

Beside these: pack/ writes the shards, remote/ fetches those at a URL, augment/ changes pixels; verify.py and show.py
are commands for packed folders; files.py, workers.py, progress.py, pil.py and urls.py are small tools.
"""
