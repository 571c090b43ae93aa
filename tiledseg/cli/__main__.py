"""``python -m tiledseg.cli`` is the command ``tiledseg``."""

from ..cli import command_line

command_line()
