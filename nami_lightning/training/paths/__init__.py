"""The paths of a stage that a network is trained on: points of the flow, and the velocity that it should give there.

- ``straight``: the line from a stage's start to its end in the data: the flow itself.
- ``rectified``: the line from a point to where a frozen teacher arrives from there: distillation to few steps.
"""
