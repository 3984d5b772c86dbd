"""Every picture, by matplotlib's Figure API and in one style."""
