"""Benchmarks of text-to-image models: their prompts, the images of any model, and what judges the images.

- ``geneval``, ``dpg``, ``nami1k``: a folder for each benchmark, with its prompts and its judge or its raters.
- ``generate``: generates the images of a benchmark with any pipeline, and resumes if it was interrupted.
- ``prompts``: the prompts of a benchmark.
- ``prompt_stats``: statistics of prompts: how long they are, and their topics.
- ``results``: what the benchmarks share: a log of verdicts, confidence intervals, and how scores are printed.
- ``side_by_side``: one picture with a row for each prompt and a column for each model.
"""
