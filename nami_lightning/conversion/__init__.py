"""Models of others, and of other shapes, as pipelines of ours.

- ``convert``: what a source is, and the folder that it becomes.
- ``released``: the release of the paper's authors.
- ``flux``: a FLUX pipeline or transformer of diffusers.
- ``add_stage``: a NAMI with one finer stage.
- ``weights``: read a model's weights without a second copy of them in memory.
- ``pipeline_folder``: write a pipeline part by part.
"""
