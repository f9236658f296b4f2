"""A page in the browser to draw with a NAMI: stages as they end, settings by stage, LoRAs, and a history.

- ``drawing``: draws an image on a thread of its own, and tells of its stages as they end.
- ``costs``: seconds and operations of the stages beside FLUX-base's, as a table.
- ``page``: the page's layout, and what its buttons do; it needs gradio.
- ``server``: serves the page to this machine alone.
"""
