"""The nouns every stage shares, and the one command."""

__version__ = "0.1.0"
