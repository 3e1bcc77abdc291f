"""Figures as inline SVG, for lessons and notebooks."""
