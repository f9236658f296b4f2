"""One training step, and what it needs: the module, its loss, its curriculum, its random numbers, its devices.

- ``module``: ``NamiModule``, the LightningModule that trains a NAMI.
- ``loss``: the loss of training and of validation; ``paths``: the points of the flow where it is measured.
- ``curriculum``: which phase a step belongs to, its sampling ratio, its learning rate.
- ``techniques``: what trains with less computation, as parts of a recipe.
- ``batch``: what the data hands to the model.
- ``frozen_encoders``: samples to latents and text states.
- ``rng``: every random number as a pure function of the seed and of a sample's place.
- ``optimizers``: Muon beside AdamW.
- ``ema``: the network of averaged weights.
- ``parallel``: what several ranks do together: share a sample's tokens, begin with the same weights.
- ``strategies``: how a network is sharded over devices and fitted into their memory.
- ``step_sync``: what the ranks agree on in every step.
- ``checks``: whether the parts of a recipe, and a checkpoint, fit together.
"""
