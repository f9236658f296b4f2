"""What several test files use.

- ``checkpoint_contents``: the numbers in checkpoints, for comparing two of them.
- ``harmful_callbacks``: callbacks that break a run in a given step.
- ``processes``: the program in processes of its own: one, or several ranks.
- ``squares``: a source of coloured rectangles.
- ``tiny_judges``: tiny models that judge images, with known answers.
- ``tiny_models``: tiny models of diffusers and transformers, as fixtures.
"""
