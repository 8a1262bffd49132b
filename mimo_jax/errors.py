"""The one error that users of mimo_jax meet."""


class MimoError(ValueError):
    """Bad input: its message has the thing's name and value, what is allowed, and the way out."""
