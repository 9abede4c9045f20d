"""What is on disk: the .trit container, its codecs, and readers of the checkpoints it is made from."""
