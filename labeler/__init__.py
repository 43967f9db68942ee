"""An LLM judges responses and writes an AI preference dataset."""
