"""The exceptions for what a user typed or supplied wrong; tools print them as one line and exit with status 2."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(ValueError):
    """A wrong option, file or data set. The message names the key or file, the value, and what would be right."""


class OptionError(UserError):
    """A wrong option of RePr: {name} in ``message`` is spelled by ``names``, as a keyword argument if that is None."""

    def __init__(self, message: str, names: Mapping[str, str] | None = None) -> None:
        self.message = message

        def spell(found: re.Match[str]) -> str:
            return f"{found[1]}=" if names is None else names.get(found[1], found[0])

        # Not str.format: a user may have typed braces.
        super().__init__(re.sub(r"\{([a-z]\w*)\}", spell, message))


@contextmanager
def spelling(names: Mapping[str, str] | None) -> Iterator[None]:
    """Spells options by ``names`` in errors from inside."""
    try:
        yield
    except OptionError as error:
        raise (error if names is None else OptionError(error.message, names)) from None
