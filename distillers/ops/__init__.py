"""What the losses share: masks, precision, features."""
