"""NAMI-1K: people rate images of the paper's kinds of prompts.

- ``prompts``: the prompts; ``examples.jsonl`` holds the 15 that the paper prints.
- ``rating_pages``: pages on which people rate; ``rating_page.html`` is their form.
- ``ratings``: the raters' answers to the paper's table.
"""
