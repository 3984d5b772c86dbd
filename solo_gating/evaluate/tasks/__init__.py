"""What the evaluations' commands do."""
