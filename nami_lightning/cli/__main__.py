"""Runs the command ``lightning`` for ``python -m nami_lightning.cli``, which torchrun uses."""

import sys

from nami_lightning.cli.main import main

sys.exit(main())
