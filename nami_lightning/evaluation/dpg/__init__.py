"""DPG-Bench: yes-or-no questions about images of long prompts.

- ``judge``: the benchmark's questions, images to answers, answers to scores.
- ``models``: the model that answers.
"""
