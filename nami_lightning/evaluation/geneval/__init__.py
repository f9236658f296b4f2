"""GenEval: whether the objects that a prompt names are in the image, in number, colour and position.

- ``prompts``: the 553 prompts, made by the benchmark's published rules; ``objects.txt`` holds its objects.
- ``models``: the detector and the colour classifier.
- ``rules``: when an image is right.
- ``judge``: images to verdicts and scores.
"""
