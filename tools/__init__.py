"""Commands: convert, inspect, perplexity, bench."""
