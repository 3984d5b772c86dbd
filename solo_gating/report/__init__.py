"""A report of all measured figures beside the published ones."""
