"""Benchmarks of generation: prompts, images of any text-to-image model, and their judges.

- ``geneval``, ``dpg``, ``nami1k``: a folder for each benchmark: its prompts, its judge or its raters.
- ``generate``: images of a benchmark's prompts, by any pipeline; run again, it goes on where it stopped.
- ``prompts``: a benchmark's prompts as items.
- ``prompt_stats``: how long the prompts are, and what they are about.
- ``results``: JSON files, a ledger of verdicts, tables, intervals.
- ``side_by_side``: one picture: a row a prompt, a column a model.
"""
