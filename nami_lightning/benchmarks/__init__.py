"""Benchmarks of speed: each measures this project and something comparable, in turns within one run.

- ``train_step``: a training step of a recipe, compared with a bare PyTorch loop over the same network.
- ``sampling``: sampling with a NAMI, compared with FLUX-base and flow-only.
- ``sampling_report``: what that measured, as tables, CSV and a plot, with the paper's figures.
- ``gpu``: one report of what a machine's GPU does.
- ``data_loading``: images read per second, compared with litdata alone and with torchvision's ImageFolder.
"""
