"""Techniques that train a network with less computation, as parts of a recipe: ``model.techniques`` lists them.

- ``technique``: what a technique is, and the forward pass that it changes.
- ``token_routing``: a share of the tokens skips the blocks in the middle (TREAD).
- ``representation_alignment``: the tokens learn to predict the features of a frozen image encoder (REPA, iREPA).
- ``contrastive_flow``: the velocity is pushed away from that of another sample (contrastive flow matching).
- ``perceptual``: the predicted image is compared with the true one by a frozen image encoder.
"""
