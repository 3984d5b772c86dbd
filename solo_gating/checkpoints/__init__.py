"""Reading checkpoints, of this package's versions and of solo-learn's, and the encoders in them."""
