"""Inputs of chance for all that the program reads, and what is asked of it: a right result or one clear error.

- ``cases``: runs one case, and tells a right result, a clear error and a fault apart.
- ``mutations``: changes bytes, texts and JSON values by chance.
- ``sources``: images, captions, metadata, tars, Parquet files, and prepared data sets.
- ``texts``: recipes, command lines, prompts, questions, rating files, answers of judges.
- ``weights``: checkpoints, releases, pipelines, LoRAs, and what runs and images say of themselves.
- ``surfaces``: the list of all of them, with their shares of the cases.
"""
