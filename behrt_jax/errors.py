"""The one exception for mistakes in what a user gives."""


class InputError(ValueError):
    """A configuration, a file or an option is wrong.

    The message names the file, row, field or option at fault and how to mend it. Commands print it
    as one line and exit with status 2; library users catch it as a ``ValueError``.
    """
