"""Scores of the samples of a prepared data set, and what they leave out of it.

- ``score``: compute scores by chunk, and write them beside the samples.
- ``score_batches``: samples that worker processes read and decode, in batches for the networks.
- ``image_scores``: numbers about one image that need no network.
- ``score_files``: the files of scores, and the scores of a whole data set.
- ``duplicates``: find images that are nearly the same.
- ``filter``: decide by scores which samples stay, and write the data set of these.
- ``filter_page``: show what a filter removes: a table, histograms, and pictures around each limit.
"""
