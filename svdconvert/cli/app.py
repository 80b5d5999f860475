"""The command line: each command reads its options, calls one function and prints one summary or error.

Importing the modules adds their commands, in the order of `--help`. What a command does is imported when it
runs, so that `--help` imports no torch.
"""

from svdconvert.cli import model_commands  # isort: skip
from svdconvert.cli import adapter_commands  # isort: skip
from svdconvert.cli import extract_commands  # isort: skip
from svdconvert.cli import chat_commands  # isort: skip
from svdconvert.cli import evaluation_commands  # isort: skip
from svdconvert.cli import report_commands  # isort: skip
from svdconvert.cli import doctor_commands  # isort: skip
from svdconvert.cli.application import app

__all__ = [
    "adapter_commands",
    "app",
    "chat_commands",
    "doctor_commands",
    "evaluation_commands",
    "extract_commands",
    "model_commands",
    "report_commands",
]
