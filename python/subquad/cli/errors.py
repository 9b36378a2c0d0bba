"""The two ways in which a command ends early: by the user's mistake, and by a check that failed."""


class UserError(Exception):
    """Something the user can mend: shown as one line without a traceback, with exit status 2."""


class CheckError(Exception):
    """A check that leaves nothing to report: shown as one line without a traceback, with exit status 1."""
