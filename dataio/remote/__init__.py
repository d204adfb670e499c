"""Remote data sets: packed folders at a URL, read through a bounded local cache.

options.py has the URL, the cache and the retry policy; fetch.py transfers a file with retries; cache_folder.py keeps
files while they are needed and evicts them; prefetch.py chooses which shards are fetched, and when.
"""
