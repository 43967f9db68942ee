"""What a reward model is worth: accuracy, calibration and length bias on labelled data."""
