"""What the features of an SAE do on text, and the page that shows it."""
