"""OpenRouter's Responses API for Open WebUI, in one file: `openrouter_responses_pipe.py`."""
