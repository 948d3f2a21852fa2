"""Training, evaluation and prediction for SERA: the parts that do not travel with the weights."""
