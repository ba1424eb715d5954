"""How good an SAE is: metrics, plots, and the report page."""
