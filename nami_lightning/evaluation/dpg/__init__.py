"""DPG-Bench: a model answers yes-or-no questions about images of long prompts.

- ``judge``: reads the benchmark's questions, asks about the images, and computes the scores.
- ``models``: the model that answers.
"""
