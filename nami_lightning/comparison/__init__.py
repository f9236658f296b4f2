"""Compares runs: what each has reached with which budget, and which differences are more than noise.

- ``compare``: reads what runs have recorded, and computes their differences with a bootstrap.
- ``recipe_differences``: in what the recipes of runs differ.
- ``seed_variance``: groups runs that differ only by their seed.
- ``report``: the comparison as tables.
- ``plots``: the comparison as plots, a grid of images, and TensorBoard events.
- ``page``: the whole comparison as one HTML page.
- ``tune_steps``: the solver steps of each stage that pay, on a trained run.
- ``sweep``: trains a list of recipes one after the other.
"""
