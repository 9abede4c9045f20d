"""Run packed Llama models on a CPU."""
