"""Training: the train step, objectives, evaluation, checkpoints and metrics."""
