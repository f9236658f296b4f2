"""What a data set leaves out: the paper's filters. Removed samples are counted under the name of the filter."""

from dataclasses import dataclass

from PIL import Image

from nami_lightning.datamodules.sources.base import SourceSample


@dataclass(frozen=True)
class Filters:
    """Limits on the samples that enter a data set; null means no limit.

    A sample that lacks a score with a limit is removed.

    Args:
        min_aesthetic: lowest aesthetic score.
        min_similarity: lowest text-image similarity.
        min_side: shortest side in px that the source's image may have.
        max_aspect_ratio: largest ratio of the longer side to the shorter side.
        min_caption_length: shortest caption in characters. Shorter captions are dropped; a sample whose captions are
            all dropped is removed.
        max_caption_length: longest caption in characters; longer captions are dropped in the same way.
        drop_duplicates: keep only the first of several images whose files are equal byte by byte; needs 16 bytes of
            memory an image.
    """

    min_aesthetic: float | None = None
    min_similarity: float | None = None
    min_side: int | None = None
    max_aspect_ratio: float | None = None
    min_caption_length: int = 1
    max_caption_length: int | None = None
    drop_duplicates: bool = False

    def texts(self, sample: SourceSample) -> list[tuple[str, float]]:
        """Return the captions whose lengths are within the limits, with their weights."""
        weights = sample.weights or [1.0] * len(sample.captions)
        longest = self.max_caption_length
        return [
            (text, weight)
            for text, weight in zip(map(str.strip, sample.captions), weights, strict=True)
            if len(text) >= self.min_caption_length and (longest is None or len(text) <= longest) and weight > 0
        ]

    def reason_by_scores(self, sample: SourceSample) -> str | None:
        """Return the filter that removes the sample, judged without its image, or None."""
        for name, limit in (("aesthetic", self.min_aesthetic), ("similarity", self.min_similarity)):
            if limit is not None and not sample.scores.get(name, float("-inf")) >= limit:
                return f"min_{name}" if name in sample.scores else f"no {name} score"
        return None if self.texts(sample) else "caption length"

    def reason_by_image(self, image: Image.Image) -> str | None:
        """Return the filter that removes the sample because of its image's size, or None."""
        short, long = sorted(image.size)
        if self.min_side is not None and short < self.min_side:
            return "min_side"
        if self.max_aspect_ratio is not None and long > self.max_aspect_ratio * short:
            return "max_aspect_ratio"
        return None
