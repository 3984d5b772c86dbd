"""Nearest neighbours, tables and pictures of what was trained."""
