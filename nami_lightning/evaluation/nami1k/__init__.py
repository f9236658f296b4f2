"""NAMI-1K: people rate the images of the paper's kinds of prompts.

- ``prompts``: reads the prompts; ``examples.jsonl`` has the 15 prompts that the paper prints.
- ``rating_pages``: writes the pages on which people rate; ``rating_page.html`` is the template.
- ``ratings``: reads the raters' answers and computes the paper's Table 5.
"""
