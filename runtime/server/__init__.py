"""The server: an HTTP interface in OpenAI's form, and a small chat page."""
