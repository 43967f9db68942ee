"""Back ends of `labeler.llm.LLM`: transformers in this process, OpenAI-compatible endpoints, and scripts."""
