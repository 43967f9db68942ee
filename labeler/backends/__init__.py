"""Back ends of `labeler.llm.LLM`: transformers and vLLM in this process, endpoints, decision models, and scripts."""
