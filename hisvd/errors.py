"""The one exception that the programs turn into a sentence and exit code 2."""


class HiSVDError(Exception):
    """Bad input or bad usage; the message is one sentence that names the culprit and the fix."""
