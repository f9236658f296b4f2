"""GenEval: checks whether an image shows the objects of its prompt, in the right number, colour and position.

- ``prompts``: the 553 prompts, made by the benchmark's published rules; ``objects.txt`` lists its objects.
- ``models``: the detector and the colour classifier.
- ``rules``: the rules that decide whether an image is correct.
- ``judge``: judges images, and computes the scores.
"""
