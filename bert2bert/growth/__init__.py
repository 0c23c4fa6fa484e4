"""A whole growth planned, from configs or from a checkpoint's description. No tensor is read here."""
