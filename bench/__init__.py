"""`python -m bench`: this repository against the plain way, side by side."""
