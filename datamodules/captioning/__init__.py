"""More captions of each image of a prepared data set, written by a model, beside those that it has.

- ``caption_kinds``: the prompts for short, medium and long captions, and the limits of their lengths.
- ``caption_task``: what is to be captioned, by which model, and the captions that a sample has afterwards.
- ``caption``: caption a data set part by part, and merge the parts.
- ``side_by_side``: show the captions of each image side by side.
"""
