"""Small helpers with no opinion: nothing here knows what a model, a run or a data set is.

- ``atomic_write``: files that appear whole or not at all.
- ``image_grid``: grids of images with their captions, and figures, as files.
- ``lazy_import``: names of a package that are imported on first use.
- ``text_table``: tables for the terminal.
"""
