"""What feeds a run: sources of images, their preparation into shards, and the multi-resolution DataModule.

- ``sources/``: read image-caption pairs from the collections that people have.
- ``preparation/``: turn a source into a prepared data set.
- ``storage/``: write, read, fetch, check and describe prepared data sets.
- ``precomputed/``: store latents and text states, so that training needs no encoder.
- ``scoring/``: score samples, and leave out those with bad scores or near-duplicates.
- ``captioning/``: more captions of each image, by a model.
- ``multi_resolution``: the DataModule.
- ``step_dataset``: the micro-batches of each training step, and of the validation.
- ``read_ahead``: how many steps are read ahead, by the bytes that they take.
- ``sample_order``: which samples make up a stage's next batch, as a pure function.
- ``stage_images``: read and decode the samples of one micro-batch.
- ``augmentation``: what training changes in a sample at random.
- ``image_formats``: which image files Pillow reads, with its plugins.
- ``aspect_buckets``: the image shapes that buckets have.
- ``module_protocols``: what the data reads from the module that is trained.

The names below are imported on first use, because preparing data needs no trainer.
"""

from nami_lightning.utils.lazy_import import lazy

_HOMES = {
    "HuggingFaceDataset": "sources",
    "ImageFolder": "sources",
    "MultiResolutionDataModule": "multi_resolution",
    "OpenMoji": "sources",
    "Parquet": "sources",
    "WebDataset": "sources",
}

__all__, __getattr__, __dir__ = lazy(__name__, _HOMES)
