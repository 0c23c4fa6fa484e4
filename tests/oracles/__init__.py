"""What other people's tools make of the same checkpoint, compared with ours; each is left out where it is not there."""
