"""The command ``lightning`` (also ``nami``): a file for each command, with its options and what it does.

``main`` makes the parser of all commands and calls the command that was asked for. Each command's file has
``add_command``, which adds the options, and a function that does the work, given to ``set_defaults(execute=...)``.
These files import nothing heavy at their top, so that ``--help`` answers at once: a function imports what it needs.

- ``main``: the parser of all commands, and how errors are printed.
- ``run``: trains what a recipe describes.
- ``distill``: trains a student that samples in few steps.
- ``sample``: generates images from prompts; ``sample_folder`` knows their files, and ``sample_processes`` shares them
  out among processes.
- ``serve``: a page in the browser to draw with a model.
- ``show``: prints the state of a run.
- ``plan``: prints what a recipe needs before it runs.
- ``data``: a room of its own: prepares, encodes, shows and verifies data sets of images with captions.
- ``convert``: makes a pipeline of the authors' release, of a FLUX, or of a NAMI with other stages.
- ``export``: writes a checkpoint as a diffusers pipeline.
- ``launch``: writes a script that runs a recipe on a cluster.
- ``evaluate``: runs the benchmarks of generated images; ``evaluate_options`` has its options.
- ``compare``: compares runs.
- ``sweep``: trains a list of recipes, then compares the runs.
- ``tune``: finds the solver steps that pay.
- ``bench``: measures the speed of training, sampling and data loading.
- ``ray_engine``: runs a command whose work is a list of parts on a Ray cluster.
- ``argument_types``: types of command-line arguments, and the help that several commands share.
"""
