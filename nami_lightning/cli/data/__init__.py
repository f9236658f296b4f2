"""``lightning data``: make data sets of images with captions, and look at them; a file for each of its commands.

- ``command``: adds ``lightning data`` and its commands to the command line.
- ``prepare``: prepares a data set from a source; ``source_arguments`` turns the command line into a source.
- ``score``: scores the samples of a data set.
- ``filter``: leaves samples out by their scores, and shows which.
- ``caption``: lets a model write more captions of each image.
- ``encode``: encodes a data set to latents and text states.
- ``show``: prints counts and captions, and writes a contact sheet.
- ``verify``: reads everything, and reports what is damaged.
- ``part_options``: the options of commands whose work is a list of parts.
"""
