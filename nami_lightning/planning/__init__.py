"""What a recipe needs on given devices, computed before it runs: memory, operations and hours.

- ``plan``: computes everything that a recipe needs.
- ``inputs``: what a plan depends on: the network, the devices and the settings.
- ``memory``: measures how much memory the activations of a micro-batch take.
- ``flops``: counts the operations of a network, and lists how fast known devices are.
- ``encoder_memory``: bytes and operations of the frozen text encoders and autoencoder.
- ``known_encoders``: the configurations of the encoders that packaged recipes name.
- ``traffic``: counts the bytes that devices send to each other.
- ``suggestions``: finds a change of settings that makes a recipe fit.
- ``report``: prints the plan as tables or as JSON.
"""
