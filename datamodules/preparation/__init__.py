"""A collection of images with captions to a prepared data set.

- ``prepare``: make a data set, or join what shards of the work have made.
- ``prepare_parts``: one part of a source to samples; it can be interrupted after any part.
- ``filters``: which samples are kept.
- ``image_io``: images read, cropped, resized and written.
"""
