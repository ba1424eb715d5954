"""Thresholds that bring a trained SAE to a wanted number of features per token."""
