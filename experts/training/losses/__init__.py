"""What a training minimizes: the loss of a prediction, and the alignment with features of the clean image."""
