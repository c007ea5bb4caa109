"""What the foreign protocols have in common: JSON bodies, and sampling options as JSON."""
