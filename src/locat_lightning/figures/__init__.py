"""Figures by matplotlib, made without pyplot: a `matplotlib.figure.Figure` that loggers and files take."""
