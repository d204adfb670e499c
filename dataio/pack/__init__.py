"""Packing: class folders, archives and WebDatasets in; shards and a manifest out (`python -m dataio.pack`)."""
