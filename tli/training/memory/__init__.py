"""What a step takes: predicted tensor by tensor, made to fit, measured."""
