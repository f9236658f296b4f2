"""Turn a source of images with captions into a prepared data set.

- ``prepare``: make a data set, or merge the parts that several processes have made.
- ``prepare_parts``: the settings of a preparation, and how one part of a source becomes shards.
- ``parts_folder``: the folder of finished parts, through which work goes on after an interruption.
- ``plan``: what a preparation would read, keep and write, told from a sample.
- ``remote_output``: a data set that is written to a remote store, part by part.
- ``source_changes``: what a data set was prepared from, and what has changed since.
- ``filters``: decide which samples are kept.
- ``image_io``: read, crop, resize and write images; colours become sRGB of 8 bits.
"""
