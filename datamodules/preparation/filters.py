"""What a data set leaves out: the paper's filters, each with a name under which it counts what it removed."""

from dataclasses import dataclass

from PIL import Image

from nami_lightning.datamodules.sources.base import SourceSample


@dataclass(frozen=True)
class Filters:
    """Limits on what enters a data set; null for none. A sample without a score that is asked for is removed.

    Args:
        min_aesthetic: lowest aesthetic score.
        min_similarity: lowest text-image similarity.
        min_side: shortest side in px, of the image as it was found.
        max_aspect_ratio: largest ratio of the longer to the shorter side.
        min_caption_length: characters of a caption; shorter ones are dropped, and the sample with its last.
        max_caption_length: likewise for longer ones.
        drop_duplicates: keep only the first of images with the very same bytes; needs 16 bytes of memory an image.
    """

    min_aesthetic: float | None = None
    min_similarity: float | None = None
    min_side: int | None = None
    max_aspect_ratio: float | None = None
    min_caption_length: int = 1
    max_caption_length: int | None = None
    drop_duplicates: bool = False

    def texts(self, sample: SourceSample) -> list[tuple[str, float]]:
        """The captions that are long and short enough, with their weights."""
        weights = sample.weights or [1.0] * len(sample.captions)
        longest = self.max_caption_length
        return [
            (text, weight)
            for text, weight in zip(map(str.strip, sample.captions), weights, strict=True)
            if len(text) >= self.min_caption_length and (longest is None or len(text) <= longest) and weight > 0
        ]

    def reason_by_scores(self, sample: SourceSample) -> str | None:
        """The filter that removes the sample by what is known without its image."""
        for name, least in (("aesthetic", self.min_aesthetic), ("similarity", self.min_similarity)):
            if least is not None and not sample.scores.get(name, float("-inf")) >= least:
                return f"min_{name}" if name in sample.scores else f"no {name} score"
        return None if self.texts(sample) else "caption length"

    def reason_by_image(self, image: Image.Image) -> str | None:
        """The filter that removes the sample by its image's size."""
        short, long = sorted(image.size)
        if self.min_side is not None and short < self.min_side:
            return "min_side"
        if self.max_aspect_ratio is not None and long > self.max_aspect_ratio * short:
            return "max_aspect_ratio"
        return None
