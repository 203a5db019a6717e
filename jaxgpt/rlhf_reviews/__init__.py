"""RLHF on movie reviews, judged by models that the training has not seen."""
