"""``python -m nami_lightning.cli`` is the command ``lightning``; torchrun starts it so."""

import sys

from nami_lightning.cli.main import main

sys.exit(main())
