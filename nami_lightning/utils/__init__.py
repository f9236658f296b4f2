"""General helpers that know nothing of models, runs or data sets.

- ``atomic_write``: files that are written completely or not at all.
- ``collectives``: collectives of torch.distributed that also work in a single process.
- ``heartbeat``: what a process does now, for messages and for a watchdog.
- ``image_grid``: grids of images with captions, and images and figures as files or data URLs.
- ``lazy_import``: names of a package that are imported on first use.
- ``text_table``: tables for the terminal.
"""
