"""How fast it is, beside something that it should be as fast as: both in turns within one run.

- ``train_step``: a recipe's step, beside a bare PyTorch loop over the same network.
- ``sampling``: a NAMI, beside FLUX-base and flow-only.
- ``data_loading``: images read a second, beside litdata alone and torchvision's ImageFolder.
"""
