"""The embedded world: a grammar, its gold utility, and two tiny language models trained in it."""
