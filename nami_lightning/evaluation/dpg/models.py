"""DPG-Bench's judge, a model of transformers that answers questions about an image.

The published judge is ModelScope's mPLUG-large, which transformers does not have. Scores of another judge can't be
compared with its scores, so the judge is named next to every score.
"""

from typing import Any

import torch
from PIL import Image

from nami_lightning.errors import first_line

YES_OR_NO = "{question} Answer with one word, yes or no."
MAX_NEW_TOKENS = 8


class QuestionJudge:
    """A model that answers a question about an image, usually with yes or no.

    Models for visual question answering (BLIP, ViLT) get the question alone. A model that chats about images gets the
    question, and is asked to answer with one word.

    Args:
        name: Hugging Face name or folder of the model.
        device: device to run on.

    Raises:
        FileNotFoundError: the model can be neither found nor downloaded.
        ValueError: it is a model of another kind.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        from transformers import AutoConfig

        try:
            architectures = AutoConfig.from_pretrained(name).architectures or [""]
            load = self._load_vqa if "QuestionAnswering" in architectures[0] else self._load_chat
            self._answer = load(name, device)
        except OSError as error:
            raise FileNotFoundError(f"judge {name} can't be loaded: {first_line(error)}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"judge {name} is not a model that answers questions about images: {first_line(error)}"
            ) from error

    @torch.inference_mode()
    def __call__(self, image: Image.Image, question: str) -> str:
        """Return the answer to a question about an image."""
        return self._answer(image, question)

    def _load_vqa(self, name: str, device: torch.device | str) -> Any:
        from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

        model = AutoModelForVisualQuestionAnswering.from_pretrained(name).eval().to(device)
        processor = AutoProcessor.from_pretrained(name)

        def answer(image: Image.Image, question: str) -> str:
            inputs = processor(images=image, text=question, return_tensors="pt").to(device)
            if not model.can_generate():
                return model.config.id2label[int(model(**inputs).logits.argmax(-1))]
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            return processor.decode(tokens[0], skip_special_tokens=True)

        return answer

    def _load_chat(self, name: str, device: torch.device | str) -> Any:
        from transformers import pipeline

        chat = pipeline("image-text-to-text", model=name, device=device)

        def answer(image: Image.Image, question: str) -> str:
            content = [{"type": "image", "image": image}, {"type": "text", "text": YES_OR_NO.format(question=question)}]
            said = chat(
                text=[{"role": "user", "content": content}],
                return_full_text=False,
                generate_kwargs={"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False},
            )
            return said[0]["generated_text"]

        return answer
