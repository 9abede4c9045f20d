"""From a checkpoint to a .trit file and back."""
