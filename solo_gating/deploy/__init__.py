"""From a trained checkpoint to what runs elsewhere."""
