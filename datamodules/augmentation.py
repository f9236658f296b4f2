"""What training changes in a sample each time that it reads it: flips, crops and shorter captions.

Every change is a function of the sample's random numbers (:class:`~nami_lightning.datamodules.stage_images.Choice`),
which are functions of the seed, the step and the sample's place in it. So a run that resumes, or has other ranks, makes
the same changes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nami_lightning.utils.sentences import sentence_ends

SIDES = (
    "left right clockwise counterclockwise anticlockwise leftmost rightmost east west text letter letters word words "
    "written writing reads says sign "
    "links rechts linke rechte linken rechten gauche droite izquierda derecha izquierdo derecho esquerda direita "
    "sinistra destra слева справа левый правый lewo prawo sol sağ kiri kanan trái phải 左 右 왼쪽 오른쪽"
)
"""Words of captions whose image must not be mirrored: sides in several languages, and writing, which would be wrong."""

NO_SPACES = 0x2E80
"""From this code point on, scripts have no spaces between words (Chinese, Japanese) or add endings (Korean)."""


@dataclass(frozen=True)
class Augmentation:
    """What training changes in samples at random; by default nothing. Held-out samples are never changed.

    The model is not told of a change. Encodings can't be changed, so training on them allows none.

    Args:
        flip: probability that an image is mirrored, left to right, if none of its captions has one of ``unflipped``.
        unflipped: words that keep an image as it is; in Chinese, Japanese and Korean
            also inside of words.
        min_crop: smallest share of an image's sides that is shown, above 0 and at most 1; each time, a share between
            this and 1 is cropped at a random place and scaled. It takes detail from images of the finest stage, because
            these are enlarged.
        caption_dropout: probability that a caption of several sentences ends after a random one of them, so that a
            model of long captions also knows short ones. (``model.prompt_dropout`` replaces whole captions.)

    Raises:
        ValueError: a number is out of its range.
    """

    flip: float = 0.0
    unflipped: list[str] = field(default_factory=SIDES.split)
    min_crop: float = 1.0
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.augmentation.{name} must be from 0 to 1; got {getattr(self, name)}")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"data.augmentation.min_crop must be above 0 and at most 1; got {self.min_crop}")

    @property
    def changes(self) -> bool:
        """Whether anything is changed."""
        return self.flip > 0 or self.min_crop < 1 or self.caption_dropout > 0

    def flips(self, number: float, captions: Sequence[str]) -> bool:
        """Return whether an image with these captions is mirrored; ``number`` is uniform in [0, 1)."""
        return number < self.flip and not any(self._names_side(caption) for caption in captions)

    def crop_share(self, number: float) -> float:
        """Return the share of the sides that a crop shows; ``number`` is uniform in [0, 1)."""
        return self.min_crop + (1 - self.min_crop) * number if self.min_crop < 1 else 1.0

    def shortened(self, caption: str, number: float, sentences: float) -> str:
        """Return a caption, or its first sentences; both numbers are uniform in [0, 1).

        Args:
            caption: the caption.
            number: decides whether it is shortened.
            sentences: decides after which sentence.
        """
        if number >= self.caption_dropout:
            return caption
        ends = [end for end in sentence_ends(caption) if caption[end:].strip()]
        return caption[: ends[int(sentences * len(ends))]] if ends else caption

    def _names_side(self, caption: str) -> bool:
        return self._words is not None and self._words.search(caption) is not None

    @cached_property
    def _words(self) -> re.Pattern[str] | None:
        if not any(self.unflipped):
            return None
        inside = [re.escape(word) for word in self.unflipped if word and ord(word[0]) >= NO_SPACES]
        whole = [re.escape(word) for word in self.unflipped if word and ord(word[0]) < NO_SPACES]
        parts = [*inside, *([rf"\b(?:{'|'.join(whole)})\b"] if whole else [])]
        return re.compile("|".join(parts), re.IGNORECASE)


NO_AUGMENTATION = Augmentation()
"""Changes nothing."""
