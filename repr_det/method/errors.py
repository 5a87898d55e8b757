"""The exceptions for what a user typed or supplied wrong; tools print them as one line and exit with status 2."""

from collections.abc import Mapping


class UserError(ValueError):
    """A wrong option, file or data set. The message names the key or file, the value, and what would be right."""


class OptionError(UserError):
    """A wrong option of RePr. It is spelled as whoever reads it wrote it: a keyword argument, or a key of a config.

    Args:
        message: the sentence, with {name} in place of the options of ``options.RePrOptions`` that it is about.
        names: option -> its spelling; None spells keyword arguments.
    """

    def __init__(self, message: str, names: Mapping[str, str] | None = None) -> None:
        self.message = message
        super().__init__(message.format_map(_Keywords() if names is None else names))

    def spelled(self, names: Mapping[str, str]) -> "OptionError":
        """The same error with other spellings."""
        return OptionError(self.message, names)


class _Keywords(dict):
    def __missing__(self, name: str) -> str:
        return f"{name}="
