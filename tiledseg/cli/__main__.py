"""``python -m tiledseg.cli`` is the command ``tiledseg``."""

import sys

from ..cli import command_line

sys.exit(command_line())
