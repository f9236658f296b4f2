"""Tokens, keys and passwords in environment variables: none may reach a file that a run writes."""

import re
from collections.abc import Mapping

SECRET = re.compile(
    r"(^|_)(API_?KEY|ACCESS_KEY|PRIVATE_KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL)S?(_|$)", re.IGNORECASE
)
"""Names of variables that hold a secret: ``HF_TOKEN``, ``WANDB_API_KEY``, ``AWS_SECRET_ACCESS_KEY`` for example."""

LEAST_CHARACTERS = 8
"""Shorter values are no secrets: ``false``, for example."""


def find_secret(text: str, environment: Mapping[str, str]) -> str | None:
    """Return the name of a variable whose secret value stands in a text; None if there is none.

    Args:
        text: what is to be written.
        environment: the process's environment variables. A value that is a path is no secret.
    """
    for name, value in environment.items():
        if SECRET.search(name) and len(value) >= LEAST_CHARACTERS and not value.startswith("/") and value in text:
            return name
    return None
