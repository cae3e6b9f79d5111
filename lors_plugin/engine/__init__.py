"""Around a model at run time: checks, hooks, resuming, optimizers."""
