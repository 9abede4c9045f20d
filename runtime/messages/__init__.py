"""Conversations: messages checked, turned into a model's tokens, kept in turns."""
