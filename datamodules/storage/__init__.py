"""Prepared data sets on a disk or in a store: how they are written, read, fetched, checked and looked at.

- ``dataset``: a prepared data set: its description, its buckets, their samples.
- ``shards``: samples to litdata chunks and back, by index.
- ``chunk_file``: the bytes of one chunk.
- ``chunk_cache``: the chunks of a remote data set that are kept on a local disk.
- ``prefetch``: which chunks the next steps need, fetched before they are read.
- ``remote``: files at a URL.
- ``chunk_checks``: what can be wrong with a chunk.
- ``verify``: read a data set whole, and report the damaged.
- ``inspect``: counts, captions, and a contact sheet.
"""
