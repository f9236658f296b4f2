"""Runs side by side: what each reached, with what budget, and which differences are more than noise.

- ``compare``: the records of runs, and the differences between them with a bootstrap.
- ``seed_variance``: runs that differ by their seed alone, taken together.
- ``report``: the comparison as tables.
- ``plots``: the comparison as plots, a grid of images, and TensorBoard events.
- ``page``: all of it as one HTML page.
- ``sweep``: train a list of recipes, each in turn.
"""
