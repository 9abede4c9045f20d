"""Talk to a model at a terminal: `python -m runtime.chat`."""
