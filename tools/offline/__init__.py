"""Inference without a server of one's own: the LLM class and `vlmrt generate`, over the actors of `vlmrt launch`."""
