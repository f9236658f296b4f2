"""Prepared data sets on a disk or in a remote store: how they are written, read, fetched, checked and described.

- ``dataset``: a prepared data set: its description, its buckets, and their samples.
- ``shards``: samples written to litdata chunks, and read again by index.
- ``chunk_file``: the items of one chunk file.
- ``chunk_cache``: the chunks of a remote data set that are kept on a local disk.
- ``prefetch``: the chunks that the next steps need, fetched before they are read.
- ``remote``: files of a data set at a URL.
- ``remote_files``: list and read the files of a source at a URL.
- ``chunk_checks``: check one chunk and all its samples.
- ``verify``: check a whole data set, and report what is damaged.
- ``inspect``: print counts and statistics of captions, and make a contact sheet.
"""
