"""Giving a trained SAE to others: to the Hugging Face hub, or in the form of another library."""
