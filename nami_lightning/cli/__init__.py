"""The command ``lightning`` (also ``nami``): a file for each command, with its options and what it does.

``main`` makes the parser of all commands and calls the one that was asked for. Each command's file has ``add_command``,
which states the options, and a function that does the work, named by ``set_defaults(execute=...)``. These files import
nothing heavy at their top, so that ``--help`` answers at once: a function imports what it needs.

- ``run``: train what a recipe describes.
- ``sample``: images from prompts.
- ``show``: what a run is.
- ``plan``: what a recipe needs, before it runs.
- ``data``: image-caption collections to shards.
- ``export``: a checkpoint as a diffusers pipeline.
- ``launch``: a script that runs a recipe on a cluster.
- ``evaluate``: benchmarks of generation.
- ``compare``: runs side by side.
- ``sweep``: train a list of recipes, then compare.
- ``bench``: how fast it is.
- ``argument_types``: numbers as the command line takes them.
"""
