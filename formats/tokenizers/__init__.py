"""Tokenizers of checkpoints, turned into the header entry and blobs of a .trit file."""
