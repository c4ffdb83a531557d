"""Input and output: checkpoints, streaming, text, evaluation."""
