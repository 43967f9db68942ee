"""What a label is worth: agreement with people, biases, calibration, and resistance to attacks."""
