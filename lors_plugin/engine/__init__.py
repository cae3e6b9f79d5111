"""What happens around a model at run time: checks, optimiser wrappers."""
