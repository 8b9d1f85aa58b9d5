"""The error that ends a command with one line instead of a traceback."""


class CommandError(RuntimeError):
    """The command cannot do what was asked; the message says what to do instead."""
