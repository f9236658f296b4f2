"""General helpers that know nothing of models, runs or data sets.

- ``atomic_write``: files that are written completely or not at all.
- ``collectives``: collectives of torch.distributed that also work in a single process.
- ``environment_secrets``: tokens and keys of the environment, which no run may write.
- ``fonts``: text on pictures in any script.
- ``heartbeat``: what a process does now, for messages and for a watchdog.
- ``image_grid``: grids of images with captions, and images and figures as files or data URLs.
- ``lazy_import``: names of a package that are imported on first use.
- ``sentences``: where sentences end.
- ``shard_index``: the index of a sharded checkpoint, looked at before torch reads it.
- ``text_files``: text files that people write, in UTF-8 or UTF-16.
- ``text_table``: tables for the terminal.
"""
