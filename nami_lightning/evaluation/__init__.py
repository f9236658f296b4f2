"""Benchmarks of generation, ``lightning evaluate``: GenEval, DPG-Bench, NAMI-1K with its raters, side-by-side grids."""
