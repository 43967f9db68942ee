"""The embedded world: a grammar, its gold utility, and two tiny language models trained in it."""

from pathlib import Path

WORLD_DIR = Path(__file__).parent
