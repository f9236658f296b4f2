"""Frozen networks that judge or describe the images of a data set, loaded by name or from a folder.

- ``contrastive``: how well an image and a text agree: any CLIP or SigLIP.
- ``aesthetic``: how good an image looks: a predictor on the features of a CLIP.
- ``text_area``: how much of an image is text: any detector of objects that knows text.
- ``captioner``: texts about images: any model that takes images and text and gives text.
"""
