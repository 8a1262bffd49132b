"""Training: the corpus and its batches, pre-training, MXFP4-aware training, the drafter."""
