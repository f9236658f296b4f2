"""Latents and text states that are computed once, so that training needs no encoder.

- ``encoding_task``: what is encoded, and the parts that the work is divided into.
- ``raw_batches``: images that worker processes read and decode, in batches for the encoders.
- ``encode``: encode the parts of a prepared data set, and merge them.
- ``records``: how encodings are stored, and how a stage reads them.
"""
