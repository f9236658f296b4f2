"""What a recipe needs before it runs: memory, operations, hours, on given devices.

- ``plan``: everything that a recipe needs, computed.
- ``inputs``: what a plan depends on: the network, the devices, the settings.
- ``memory``: bytes on a device, part by part.
- ``flops``: operations of a network, and what known devices can do.
- ``encoder_memory``: bytes and operations of the frozen encoders.
- ``suggestions``: which settings make a recipe fit.
- ``report``: the plan as tables.
"""
