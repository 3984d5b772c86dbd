"""The one exception that is a user's mistake rather than a bug."""


class InputError(ValueError):
    """Bad input: a config value, a checkpoint or a data file that cannot be used.

    Its message is one sentence that names the key or file, what was found and what is accepted.
    The entry points print that sentence without a stack trace; library callers may catch it.
    """
