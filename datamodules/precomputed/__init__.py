"""Latents and text states that are computed once, so that training needs no encoder.

- ``encode``: a prepared data set of images to one of latents and text states.
- ``records``: what is stored of a sample, and how a stage reads it.
"""
