"""The gateway to vLLM, and the plugin inside it."""
