"""The one exception for what a user typed or supplied wrong; tools print it as one line and exit with status 2."""


class UserError(ValueError):
    """A wrong config value, file or data set. The message names the key or file, the value, and what would be right."""
