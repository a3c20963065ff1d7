"""What a model can be calibrated with: recorded, fitted, stored beside its weights."""
