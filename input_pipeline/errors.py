"""Errors a user can mend: the command line prints their message alone and leaves with their exit code."""

from __future__ import annotations


class UserError(Exception):
    """Unusable arguments, configuration or input. The message names the file, the field and the remedy.

    Everything else that is raised is a defect of the program and keeps its traceback.
    """

    exit_code: int = 2
