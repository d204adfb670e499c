"""Data sets at a URL: fetched with retries (fetch.py) into a bounded folder of this machine (cache_folder.py).

prefetch.py decides which shards are fetched and when; options.py says where to, how much is kept, and how long to try.
"""
