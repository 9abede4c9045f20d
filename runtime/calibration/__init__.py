"""Quantising a model layer by layer with a calibration text: see run.py."""
