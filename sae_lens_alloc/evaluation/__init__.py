"""Calibration, evaluation of saved SAEs, and the report page."""
