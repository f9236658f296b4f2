"""DPG-Bench's judge, from transformers: a model that answers questions about an image.

The published one is mPLUG-large of ModelScope, which transformers does not have; scores of another judge are not
comparable with it, so the judge is named beside every score.
"""

from typing import Any

import torch
from PIL import Image

from nami_lightning.errors import first_line

YES_OR_NO = "{question} Answer with one word, yes or no."
MOST_TOKENS = 8


class QuestionJudge:
    """Answers a question about an image, with yes or no if all goes well.

    Models made for visual question answering (BLIP, ViLT) get the bare question; a model that chats about images gets
    the question and the wish for one word.

    Args:
        name: Hugging Face name or folder.
        device: to run on.

    Raises:
        FileNotFoundError: it can be neither found nor fetched.
        ValueError: a model of another kind.
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
                f"judge {name} is no model that answers questions about images: {first_line(error)}"
            ) from error

    @torch.inference_mode()
    def __call__(self, image: Image.Image, question: str) -> str:
        """The answer."""
        return self._answer(image, question)

    def _load_vqa(self, name: str, device: torch.device | str) -> Any:
        from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

        model = AutoModelForVisualQuestionAnswering.from_pretrained(name).eval().to(device)
        processor = AutoProcessor.from_pretrained(name)

        def answer(image: Image.Image, question: str) -> str:
            inputs = processor(images=image, text=question, return_tensors="pt").to(device)
            if not model.can_generate():
                return model.config.id2label[int(model(**inputs).logits.argmax(-1))]
            tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
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
                generate_kwargs={"max_new_tokens": MOST_TOKENS, "do_sample": False},
            )
            return said[0]["generated_text"]

        return answer
